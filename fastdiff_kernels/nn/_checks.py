"""Argument checks shared by the networks and blocks."""

from __future__ import annotations

import torch
from torch import nn

from ..ops._checks import DTYPES


def divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raise unless `divisor` divides `value`."""
    if value % divisor:
        also = "" if divisor_name == str(divisor) else f" and {divisor_name}={divisor}"
        raise ValueError(f"{name} must be divisible by {divisor_name}, got {name}={value}{also}")


def network_input(x: torch.Tensor, noise_level: torch.Tensor, channels: int, multiple: int, first: nn.Module) -> None:
    """Check x [B, channels, H, W], of a dtype for the `first` layer, with H and W multiples of `multiple`, and noise_level [B]."""
    feature_map(x, channels)
    check_dtypes(first, x=x)
    if x.shape[2] < multiple or x.shape[3] < multiple or x.shape[2] % multiple or x.shape[3] % multiple:
        raise ValueError(f"x must have a height and width divisible by {multiple}, got {x.shape[2]}x{x.shape[3]}")
    if noise_level.dim() != 1 or noise_level.shape[0] != x.shape[0]:
        raise ValueError(f"noise_level must have shape [{x.shape[0]}], got {tuple(noise_level.shape)}")
    if not noise_level.is_floating_point():
        raise TypeError(f"noise_level must be floating point, got {noise_level.dtype}")


def feature_map(x: torch.Tensor, channels: int) -> None:
    """Check x [B, channels, H, W]."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x must have shape [B, {channels}, H, W], got {tuple(x.shape)}")


def sequence(name: str, x: torch.Tensor, channels: int, batch: int | None = None) -> None:
    """Check a sequence [B, N, channels], of `batch` samples where that is given."""
    if x.dim() != 3 or x.shape[2] != channels or (batch is not None and x.shape[0] != batch):
        expected = "B" if batch is None else batch
        raise ValueError(f"{name} must have shape [{expected}, N, {channels}], got {tuple(x.shape)}")


def vectors(name: str, x: torch.Tensor, batch: int, width: int) -> None:
    """Check one vector a sample, [batch, width]."""
    if x.shape != (batch, width):
        raise ValueError(f"{name} must have shape [{batch}, {width}], got {tuple(x.shape)}")


def check_dtypes(layer: nn.Module, **inputs: torch.Tensor) -> None:
    """Raise unless layers like this one take the inputs: of their dtype or, under autocast, any but float64."""
    weight = layer.weight
    # What takes a layer's place in quantisation knows itself what it can do.
    if not isinstance(weight, torch.Tensor) or weight.dtype not in DTYPES:
        return
    for name, x in inputs.items():
        if x.dtype != weight.dtype and not _autocast_takes(x, weight):
            raise TypeError(f"{name} must be {weight.dtype}, the dtype of the parameters, got {x.dtype}")


def _autocast_takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return enabled and x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
