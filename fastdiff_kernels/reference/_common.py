"""Shapes and dtypes that every definition shares."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype arithmetic is done in: float64 for float64 inputs, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_sample(value: float | Tensor, like: Tensor) -> Tensor:
    """A float, 0-d tensor or tensor [B] (or [1]) shaped to broadcast against like [B, ...], in its compute dtype."""
    value = torch.as_tensor(value, dtype=compute_dtype(like), device=like.device)
    return value.reshape(-1, *[1] * (like.dim() - 1)) if value.dim() else value


def sum_per_sample(x: Tensor) -> Tensor:
    """The sum over all but the first dimension. [B, ...] -> [B]"""
    return x.flatten(1).sum(1) if x.dim() > 1 else x.clone()


def mean_per_sample(x: Tensor) -> Tensor:
    """The mean over all but the first dimension. [B, ...] -> [B]"""
    return x.flatten(1).mean(1) if x.dim() > 1 else x.clone()
