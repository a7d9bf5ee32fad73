"""Argument checks the diffusion modules share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_positive
from ..ops._checks import readable


def check_samples(x: Tensor, name: str) -> Tensor:
    """A floating-point tensor [B, ...]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.ndim < 1:
        raise ValueError(f"{name} must have shape [B, ...], got a 0-d tensor")
    return x


def batched_sigma(sigma: float | Tensor, x: Tensor, name: str = "sigma") -> Tensor:
    """`sigma` as a positive tensor [B] on x's device: float32, or float64 where it came so or x is float64."""
    if isinstance(sigma, Tensor):
        if not sigma.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {sigma.dtype}")
        if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] != x.shape[0]):
            raise ValueError(f"{name} must be a number, a 0-d tensor or a tensor of shape [{x.shape[0]}], got shape {list(sigma.shape)}")
        if sigma.ndim == 1 and sigma.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {sigma.device}")
        if readable(sigma) and not bool(((sigma > 0) & (sigma < math.inf)).all()):
            raise ValueError(f"{name} must be positive and finite, got {sigma.tolist()}")
        dtype = torch.promote_types(sigma.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32)
        sigma = sigma.to(device=x.device, dtype=dtype)
    else:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        sigma = torch.tensor(check_positive(sigma, name), dtype=dtype, device=x.device)
    return sigma.expand(x.shape[0])  # [B]


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to stand beside x."""
    return value.view(-1, *([1] * (x.ndim - 1)))
