"""Interval costs of image batches, and cost integration on grids up to a million knots."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from benchmarks.workloads import Workload
from fastdiff_kernels import ops

STEPS = 18
LOW, HIGH, SIGMA_DATA = 0.5, 0.6, 0.5
SHAPES = {"digits": (128, 1, 8, 8), "EDM 64": (16, 3, 64, 64)}
INTERVALS = (256, 1_000_000)


def incremental_cost(x, raw_low, raw_high):
    def score(raw, sigma):
        variance = sigma**2 + SIGMA_DATA**2
        return SIGMA_DATA / (sigma * variance**0.5) * raw - x / variance

    return LOW**2 * (score(raw_low, LOW) - score(raw_high, HIGH)).square().flatten(1).sum(1)


def our_incremental_cost(x, raw_low, raw_high):
    return ops.incremental_cost(x, raw_low, raw_high, LOW, HIGH, sigma_data=SIGMA_DATA)


def solve(sigmas, costs, interpolation):
    """NumPy and SciPy, in float64."""
    knots, increments = sigmas.cpu().double().numpy(), costs.cpu().double().numpy()
    widths = np.sqrt(np.maximum(increments, 1e-12 * increments.max()))
    length = np.concatenate(([0.0], np.cumsum(widths)))
    targets = np.arange(STEPS + 1) / STEPS * length[-1]
    solved = PchipInterpolator(length, knots)(targets) if interpolation == "pchip" else np.interp(targets, length, knots)
    return torch.from_numpy(solved).to(sigmas)


def grid(intervals):
    """A knot's rise is far above float32's rounding at a million of them."""
    costs = np.random.default_rng(0).lognormal(size=intervals)
    return [torch.from_numpy(np.geomspace(80, 0.002, intervals + 1)).float(), torch.from_numpy(costs).float()]


WORKLOADS = [
    Workload(
        "incremental_cost",
        network,
        shape,
        lambda shape=shape: [torch.randn(shape) for _ in range(3)],
        incremental_cost,
        our_incremental_cost,
        factor=8.0,
    )
    for network, shape in SHAPES.items()
] + [
    Workload(
        "integrate_schedule",
        interpolation,
        (intervals,),
        lambda intervals=intervals: grid(intervals),
        lambda sigmas, costs, kind=interpolation: solve(sigmas, costs, kind),
        lambda sigmas, costs, kind=interpolation: ops.integrate_schedule(sigmas, costs, STEPS, interpolation=kind),
        compiled=False,
        captured=False,
        dtypes=(torch.float32,),
    )
    for intervals in INTERVALS
    for interpolation in ("pchip", "linear")
]


def test_speed(case, measure):
    measure(case)
