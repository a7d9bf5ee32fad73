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


def _solver_step(dtype: torch.dtype, device: str) -> list[tuple]:
    x, denoised, uncond, point = _four(3, 2, 5, dtype=dtype, device=device)
    newest, older, one, zero = (torch.roll(t, 1, 0) for t in (x, denoised, uncond, point))
    rows = torch.tensor([1, -1, 0], device=device)
    # steps, reuses in a row, reuse, predictions, their times, d
    row = [6.0, 1.0, 1.0, 2.0, 2.0, 2.5, 1.0, 1.1, 1.2]
    state = torch.tensor([row, row, [3.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.5, 0.6]], dtype=torch.float64, device=device)
    ones, vp = [1.0] * 4, [0.7, 0.6, 0.5, 0.4]
    none = (None,) * 10
    return [
        (x, denoised, uncond, *none[:7], state, 1.5, 1.0, 2.0, 1.5, 1.5, 0.0, *ones, "official", 0.1, 4, True, True),
        (x, denoised[:2], uncond[:2], rows, newest, older, None, point, one, zero, state, 1.5, 0.2, 2.0, 1.5, 1.2, 0.0, *vp, "tensor",
         4.0, 4, True, True),
        (x, None, None, None, newest, older, denoised, None, one, zero, state[:1], 1.5, 1.0, 1.0, 1.5, 1.2, 0.4, *ones, "tensor",
         0.1, 4, False, True),
        (x, denoised, *none[:8], None, 1.5, 0.0, 1.0, 1.5, 1.5, 0.0, *ones, "none", 0.0, 1, False, False),
    ]  # fmt: skip


SAMPLES = {
    "third_order_skip": _third_order_skip,
    "third_order_difference": _third_order_difference,
    "solver_step": _solver_step,
}
