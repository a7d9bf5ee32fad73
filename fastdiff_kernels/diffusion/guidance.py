"""Classifier-free guidance, and the conditioning of a doubled batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def guide(denoised: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """uncond + guidance (denoised - uncond), all [B, ...]; `denoised` itself without `uncond` (Ho and Salimans, arXiv 2207.12598)."""
    return denoised if uncond is None else uncond + guidance * (denoised - uncond)


def check_conditioning(conditioning: Mapping[str, object] | None, batch: int, name: str) -> dict[str, object]:
    """Keyword arguments of a denoiser: tensors [batch, ...], and Python scalars that hold for the whole batch. None is no argument."""
    if conditioning is None:
        return {}
    if not isinstance(conditioning, Mapping):
        raise TypeError(f"{name} must be a dict of keyword arguments for the denoiser, got {type(conditioning).__name__}")
    for key, value in conditioning.items():
        if isinstance(value, Tensor):
            if value.ndim == 0 or value.shape[0] != batch:
                raise ValueError(f"{name}[{key!r}] must have one row for each of the {batch} samples, got shape {list(value.shape)}")
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            raise TypeError(f"{name}[{key!r}] must be a tensor [B, ...] or a scalar, got {type(value).__name__}")
    return dict(conditioning)


def stack_conditioning(conditioning: dict[str, object], unconditional: dict[str, object]) -> dict[str, object]:
    """The conditioning of a batch that holds the conditional samples first and the unconditional ones after them."""
    if conditioning.keys() != unconditional.keys():
        raise ValueError(f"unconditional must have conditioning's keys {sorted(conditioning)}, got {sorted(unconditional)}")
    return {key: _stack(key, value, unconditional[key]) for key, value in conditioning.items()}


def _stack(key: str, conditional: object, unconditional: object) -> object:
    if isinstance(conditional, Tensor) and isinstance(unconditional, Tensor):
        if conditional.shape != unconditional.shape or conditional.dtype != unconditional.dtype:
            raise ValueError(
                f"unconditional[{key!r}] must be like conditioning's, {conditional.dtype} {list(conditional.shape)}, "
                f"got {unconditional.dtype} {list(unconditional.shape)}"
            )
        return torch.cat((conditional, unconditional))
    if isinstance(conditional, Tensor) or isinstance(unconditional, Tensor) or conditional != unconditional:
        raise ValueError(f"unconditional[{key!r}] can differ from conditioning's only where both are tensors")
    return conditional


def take_rows(conditioning: dict[str, object], rows: Tensor) -> dict[str, object]:
    """The conditioning of the samples `rows` (int64)."""
    return {
        key: value[rows.to(value.device, non_blocking=True)] if isinstance(value, Tensor) else value for key, value in conditioning.items()
    }
