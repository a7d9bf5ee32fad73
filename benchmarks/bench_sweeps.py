"""Cost as work grows: one size of an op at a time, each a line in the report's figures."""

from __future__ import annotations

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch.nn import functional as F

from benchmarks.rivals import sdpa
from benchmarks.workloads import Workload
from fastdiff_kernels import ops

# Inductor adds in other orders than eager, less exactly.
FACTOR = 8.0
FLOAT32 = (torch.float32,)


def norm_modulate(residual, branch, gate, shift, scale):
    hidden = residual + gate.unsqueeze(1) * branch
    return hidden, F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulation_inputs(batch: int, tokens: int, channels: int) -> list[torch.Tensor]:
    return [*(torch.randn(batch, tokens, channels) for _ in range(2)), *torch.randn(batch, 3 * channels).chunk(3, dim=1)]


def modulation(variable: str, batch: int, tokens: int, channels: int) -> Workload:
    value = {"B": batch, "N": tokens, "C": channels}[variable]
    return Workload(
        "gate_residual_norm_modulate", "sweep", f"{variable}={value}", lambda: modulation_inputs(batch, tokens, channels),
        norm_modulate, ops.gate_residual_norm_modulate, gradients=tuple(range(5)), factor=FACTOR, compiled=False,
    )  # fmt: skip


def softmax_attention(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def attention(variable: str, tokens: int, width: int) -> Workload:
    value = {"N": tokens, "D": width}[variable]
    return Workload(
        "attention", "sweep", f"{variable}={value}",
        lambda: [torch.randn(1, tokens, 8, width) for _ in range(3)],
        softmax_attention, ops.attention, gradients=(0, 1, 2), rivals={"sdpa": sdpa}, factor=FACTOR, compiled=False,
        flops=lambda q, k, v: 4 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3], backward_flops=2.5,
    )  # fmt: skip


def lcss(score, noise):
    return (score * noise).flatten(1).sum(1) / 0.5 + 0.5 * score.square().flatten(1).sum(1)


def lcss_loss(side: int) -> Workload:
    return Workload(
        "lcss_loss", "sweep", f"elements={3 * side * side}", lambda: [torch.randn(8, 3, side, side) for _ in range(2)],
        lcss, lambda score, noise: ops.lcss_loss(score, noise, 0.5), gradients=(0,), factor=FACTOR, compiled=False, dtypes=FLOAT32,
    )  # fmt: skip


def solve(sigmas, costs, steps):
    """NumPy and SciPy."""
    increments = costs.numpy(force=True)
    length = np.concatenate(([0.0], np.cumsum(np.sqrt(increments))))
    solved = PchipInterpolator(length, sigmas.numpy(force=True))(np.arange(steps + 1) / steps * length[-1])
    return torch.from_numpy(solved).to(sigmas.device, sigmas.dtype)


def schedule(variable: str, knots: int, steps: int) -> Workload:
    value = {"knots": knots, "steps": steps}[variable]
    return Workload(
        "integrate_schedule", "sweep", f"{variable}={value}",
        lambda: [torch.linspace(80, 0.002, knots + 1), torch.rand(knots) + 0.5],
        lambda sigmas, costs: solve(sigmas, costs, steps), lambda sigmas, costs: ops.integrate_schedule(sigmas, costs, steps),
        compiled=False, captured=False, factor=FACTOR, dtypes=FLOAT32,
    )  # fmt: skip


WORKLOADS = [
    *(modulation("B", batch, 64, 384) for batch in (1, 4, 16, 64)),
    *(modulation("N", 2, tokens, 384) for tokens in (16, 64, 256, 1024)),
    *(modulation("C", 2, 128, channels) for channels in (64, 320, 1152, 3072)),
    *(attention("N", tokens, 72) for tokens in (64, 256, 1024)),
    *(attention("D", 256, width) for width in (40, 72, 128, 256)),
    *(lcss_loss(side) for side in (8, 32, 128)),
    *(schedule("knots", knots, 18) for knots in (100, 10_000, 1_000_000)),
    *(schedule("steps", 10_000, steps) for steps in (10, 100, 1000)),
]


def test_speed(case, measure):
    measure(case)
