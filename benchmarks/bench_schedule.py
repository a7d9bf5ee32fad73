"""Interval costs of image batches, and cost integration on grids up to a million knots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import PchipInterpolator

from fastdiff_kernels import ops

STEPS = 18
LOW, HIGH, SIGMA_DATA = 0.5, 0.6, 0.5


def incremental_cost(x, raw_low, raw_high):
    def score(raw, sigma):
        variance = sigma**2 + SIGMA_DATA**2
        return SIGMA_DATA / (sigma * variance**0.5) * raw - x / variance

    return LOW**2 * (score(raw_low, LOW) - score(raw_high, HIGH)).square().flatten(1).sum(1)


@pytest.mark.parametrize("shape", [(128, 1, 8, 8), (16, 3, 64, 64)], ids=str)
def test_incremental_cost(compare, shape):
    inputs = [torch.randn(shape) for _ in range(3)]
    compiled = torch.compile(incremental_cost, dynamic=False)
    variants = {
        "eager": lambda: incremental_cost(*inputs),
        "compile": lambda: compiled(*inputs),
        "ours": lambda: ops.incremental_cost(*inputs, LOW, HIGH, sigma_data=SIGMA_DATA),
    }
    compare(f"incremental_cost {shape}", "forward", variants, (incremental_cost(*[x.double() for x in inputs]),))


@pytest.mark.parametrize("interpolation", ["pchip", "linear"])
@pytest.mark.parametrize("intervals", [256, 1_000_000])
def test_integrate_schedule(compare, intervals, interpolation):
    """Eager is NumPy and SciPy."""
    sigmas = np.geomspace(80, 0.002, intervals + 1)
    costs = np.random.default_rng(0).lognormal(size=intervals)

    def solve():
        widths = np.sqrt(np.maximum(costs, 1e-12 * costs.max()))
        length = np.concatenate(([0.0], np.cumsum(widths)))
        targets = np.arange(STEPS + 1) / STEPS * length[-1]
        solved = PchipInterpolator(length, sigmas)(targets) if interpolation == "pchip" else np.interp(targets, length, sigmas)
        return torch.from_numpy(solved)

    knots, increments = torch.from_numpy(sigmas), torch.from_numpy(costs)
    variants = {"eager": solve, "ours": lambda: ops.integrate_schedule(knots, increments, STEPS, interpolation=interpolation)}
    compare(f"integrate_schedule {intervals} {interpolation}", "forward", variants, (solve(),))
