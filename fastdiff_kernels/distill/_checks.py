"""Argument checks the recipes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.guidance import leaves

HALF_PRECISION = (torch.float16, torch.bfloat16)


def check_shape(shape: Sequence[int], name: str) -> tuple[int, ...]:
    """The shape of one sample: positive integers."""
    if isinstance(shape, int) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{name} must be a sequence of positive ints, got {shape!r}")
    return tuple(shape)


def check_denoiser(denoiser: nn.Module, name: str) -> nn.Module:
    """A module with at least one floating-point parameter."""
    if not isinstance(denoiser, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module called as {name}(x, sigma, **conditioning), got {type(denoiser).__name__}")
    if not any(parameter.is_floating_point() for parameter in denoiser.parameters()):
        raise ValueError(f"{name} must have parameters, got a module without any")
    return denoiser


def check_conditioning(conditioning: Mapping[str, Any] | None, batch_size: int) -> dict[str, Any]:
    """Keyword arguments of the denoiser, each a tensor [batch_size, ...], None, or a dict of such."""
    if conditioning is None:
        return {}
    if not isinstance(conditioning, Mapping):
        raise TypeError(f"conditioning must be a mapping from names to tensors, got {type(conditioning).__name__}")
    for name, value in leaves(conditioning, "conditioning"):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dim() == 0 or value.shape[0] != batch_size:
            raise ValueError(f"{name} must have shape [{batch_size}, ...], got {list(value.shape)}")
    return dict(conditioning)


def check_flag(value: bool, name: str) -> bool:
    """True or False: another value's truth may not be what was meant."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_data(batch: object, name: str, sample_shape: tuple[int, ...] | None, like: Tensor) -> Tensor:
    """Clean data [B, *sample_shape], B at least 1, of `like`'s dtype and device."""
    if not isinstance(batch, Tensor):
        raise TypeError(f"{name} must be a tensor of clean data [B, ...], got {type(batch).__name__}")
    if batch.dim() < 1 or (sample_shape is not None and tuple(batch.shape[1:]) != sample_shape):
        expected = "[B, ...]" if sample_shape is None else f"[B, {', '.join(map(str, sample_shape))}]"
        raise ValueError(f"{name} must have shape {expected}, got {list(batch.shape)}")
    if batch.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one sample, got none")
    if batch.dtype != like.dtype:
        raise TypeError(f"{name} must have the network's dtype {like.dtype}, got {batch.dtype}")
    if batch.device != like.device:
        raise ValueError(f"{name} must be on the network's device {like.device}, got {batch.device}")
    return batch


def check_precision(network: nn.Module, name: str) -> None:
    """Trained parameters are float32 or float64: in 16 bits a small step, of Adam or of the average, rounds to none at all."""
    for path, parameter in network.named_parameters():
        if parameter.requires_grad and parameter.dtype in HALF_PRECISION:
            raise TypeError(
                f"{name} must have float32 or float64 parameters to be trained, as a teacher's copies are; got {parameter.dtype} ({path}). "
                "Give a float32 network (its method float() makes it so) and, to compute in 16 bits, autocast=torch.bfloat16"
            )


def check_autocast(dtype: torch.dtype | None) -> torch.dtype | None:
    """A dtype that torch.autocast casts to."""
    if dtype is not None and dtype not in HALF_PRECISION:
        raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got {dtype}")
    return dtype
