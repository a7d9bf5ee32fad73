"""Sample calls of attention, for the contract that every op is tested against."""

from __future__ import annotations

import torch


def _attention(dtype, device):
    generator = torch.Generator().manual_seed(13)
    q, k, v = (torch.randn(2, rows, 2, 3, generator=generator, dtype=torch.float64).to(device, dtype) for rows in (4, 5, 5))
    return [
        (q, k, v, 0.6, None),
        (q, k, v, 0.6, torch.tensor([3, 7], device=device)),
    ]


SAMPLES = {"attention": _attention}
