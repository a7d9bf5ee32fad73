"""Argument checks shared by the networks and blocks."""

from __future__ import annotations

import torch


def divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Raise unless `divisor` divides `value`."""
    if value % divisor:
        also = "" if divisor_name == str(divisor) else f" and {divisor_name}={divisor}"
        raise ValueError(f"{name} must be divisible by {divisor_name}, got {name}={value}{also}")


def network_input(x: torch.Tensor, noise_level: torch.Tensor, channels: int, multiple: int) -> None:
    """Check x [B, channels, H, W] with H and W multiples of `multiple`, and noise_level [B]."""
    feature_map(x, channels)
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
