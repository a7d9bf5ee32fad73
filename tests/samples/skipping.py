"""Sample calls of the skipping ops."""

from __future__ import annotations

import torch


def _three(*shape: int, dtype: torch.dtype, device: str) -> tuple:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.rand(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3))


def _four(*shape: int, dtype: torch.dtype, device: str) -> tuple:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(4))


def _third_order_skip(dtype: torch.dtype, device: str) -> list[tuple]:
    threshold = torch.full((1,), 0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    return [(*_three(7, dtype=dtype, device=device), threshold), (*_three(dtype=dtype, device=device), threshold)]


def _third_order_difference(dtype: torch.dtype, device: str) -> list[tuple]:
    return [_four(3, 2, 5, dtype=dtype, device=device), _four(2, dtype=dtype, device=device)]


SAMPLES = {"third_order_skip": _third_order_skip, "third_order_difference": _third_order_difference}
