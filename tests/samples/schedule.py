"""Sample calls of the schedule ops."""

from __future__ import annotations

import torch


def _incremental_cost(dtype: torch.dtype, device: str) -> list[tuple]:
    generator = torch.Generator().manual_seed(5)
    x, raw_low, raw_high = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3))
    low, high = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64, device=device), torch.tensor([3.0], dtype=torch.float64, device=device)
    return [(x, raw_low, raw_high, low, high, 0.5), (x, raw_low, raw_high, low[:1], high, 1.5)]


def _integrate_schedule(dtype: torch.dtype, device: str) -> list[tuple]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sigmas = torch.tensor([[80.0, 9.0, 2.0, 0.3, 0.002], [0.1, 0.2, 3.0, 4.0, 5.0]], dtype=wide, device=device)
    costs = torch.tensor([[1.0, 4.0, 0.0, 0.2], [2.0, 2.0, 9.0, 0.5]], dtype=wide, device=device)
    return [(sigmas, costs, 6, "pchip"), (sigmas, costs, 3, "linear"), (sigmas[0], costs[0], 1, "pchip")]


SAMPLES = {"incremental_cost": _incremental_cost, "integrate_schedule": _integrate_schedule}
