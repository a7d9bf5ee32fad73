"""Criteria of AdaptiveDiffusion, and the solver step that ends in one, on latents of Stable Diffusion's size and on 256 x 256 pixels."""

from __future__ import annotations

import functools

import torch

from benchmarks.workloads import Workload
from fastdiff_kernels import ops
from fastdiff_kernels.reference.skipping import D2, REUSE, STATE_WIDTH

SHAPES = {"SD": (2, 4, 64, 64), "SD x 16": (16, 4, 64, 64), "pixels": (4, 3, 256, 256)}
SIGMA, SIGMA_NEXT, GUIDANCE, THRESHOLD, EARLIER = 2.0, 1.5, 5.0, 0.01, 0.7


def normals(count, shape):
    return lambda: [torch.randn(shape) for _ in range(count)]


def difference(x0, x1, x2, x3):
    return (x3 - 3 * x2 + 3 * x1 - x0).abs().flatten(1).mean(1), (x3 - x2).abs().flatten(1).mean(1)


def skip(d0, d1, d2):
    return (((d0 + d2) / 2 - d1).abs() <= THRESHOLD * d1).to(d0.dtype)


def ours_skip(d0, d1, d2):
    return ops.third_order_skip(d0, d1, d2, THRESHOLD).to(d0.dtype)


def published_step(x, cond, uncond):
    """Guidance, an Euler step, the mean change and the test on it, whose outcome the host needs: call by call as published.

    The published pipeline predicts noise, which costs its Euler step one more pass than the denoised samples here.
    """
    denoised = uncond + GUIDANCE * (cond - uncond)
    derivative = (x - denoised) / SIGMA
    following = x + derivative * (SIGMA_NEXT - SIGMA)
    change = (following - x).abs().mean()
    reuse = bool(((change + EARLIER) / 2 - EARLIER).abs() <= THRESHOLD * EARLIER)
    return following, derivative, change.reshape(1), torch.tensor([float(reuse)])


@functools.cache
def earlier_state(device):
    """What the step before handed on, as the published one has its changes from it."""
    return torch.full((1, STATE_WIDTH), EARLIER, dtype=torch.float64, device=device)


def our_step(x, cond, uncond):
    rule = {"state": earlier_state(x.device), "mode": "official", "threshold": THRESHOLD}
    step = ops.solver_step(x, SIGMA, SIGMA_NEXT, denoised=cond, uncond=uncond, guidance=GUIDANCE, keep_noise=True, **rule)
    return step.x_next, step.noise, *decision(step.state)


def decision(state):
    """The last change, and whether the host has the next step reuse."""
    reuse = state.tolist()[0][REUSE]
    return state[:, D2], torch.tensor([reuse])


def held_step(x, noise):
    """A reused step: the held prediction's Euler step and the test."""
    following = x + noise * (SIGMA_NEXT - SIGMA)
    change = (following - x).abs().mean()
    reuse = bool(((change + EARLIER) / 2 - EARLIER).abs() <= THRESHOLD * EARLIER)
    return following, change.reshape(1), torch.tensor([float(reuse)])


def our_held_step(x, noise):
    rule = {"state": earlier_state(x.device), "mode": "official", "threshold": THRESHOLD}
    step = ops.solver_step(x, SIGMA, SIGMA_NEXT, newest=noise, **rule)
    return step.x_next, *decision(step.state)


# Name: inputs, eager, ours, whether a call can be compiled and captured: not where the host reads the decision.
OPS = {
    "third_order_difference": (4, difference, ops.third_order_difference, True),
    "solver_step": (3, published_step, our_step, False),
    "solver_step reused": (2, held_step, our_held_step, False),
}

WORKLOADS = [
    Workload(name, network, shape, normals(count, shape), eager, ours, factor=8.0, compiled=compiled, captured=compiled)
    for network, shape in SHAPES.items()
    for name, (count, eager, ours, compiled) in OPS.items()
] + [Workload("third_order_skip", "decisions", (64,), lambda: [torch.rand(64) for _ in range(3)], skip, ours_skip)]


def test_speed(case, measure):
    measure(case)
