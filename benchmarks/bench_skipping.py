"""Criteria of AdaptiveDiffusion, and ten solver steps that end in one, on latents of Stable Diffusion's size and on 256 x 256 pixels."""

from __future__ import annotations

from itertools import pairwise

import torch

from benchmarks.workloads import Workload
from fastdiff_kernels import ops
from fastdiff_kernels.reference.skipping import CAP_FREE_ENTRIES, REUSE, STATE_WIDTH, WARM_UP_STEPS

SHAPES = {"SD": (2, 4, 64, 64), "SD x 16": (16, 4, 64, 64), "pixels": (4, 3, 256, 256)}
LEVELS = [2.0 - 0.1 * k for k in range(11)]
GUIDANCE, THRESHOLD, MAX_SKIP = 5.0, 0.01, 4


def normals(count, shape):
    return lambda: [torch.randn(shape) for _ in range(count)]


def difference(x0, x1, x2, x3):
    return (x3 - 3 * x2 + 3 * x1 - x0).abs().flatten(1).mean(1), (x3 - x2).abs().flatten(1).mean(1)


def skip(d0, d1, d2):
    return (((d0 + d2) / 2 - d1).abs() <= THRESHOLD * d1).to(d0.dtype)


def ours_skip(d0, d1, d2):
    return ops.third_order_skip(d0, d1, d2, THRESHOLD).to(d0.dtype)


def published_steps(x, cond, uncond):
    """Guidance, an Euler step, the mean change and the test on it, whose outcome the host needs: call by call as published.

    The published pipeline predicts noise, which costs its Euler step one more pass than the denoised samples here.
    """
    changes, reuses = [], []
    for sigma, following in pairwise(LEVELS):
        denoised = uncond + GUIDANCE * (cond - uncond)
        noise = (x - denoised) / sigma
        x = stepped(x, noise, following - sigma, changes, reuses)
    return x, noise, torch.tensor(reuses)


def held_steps(x, noise):
    """Reused steps: the held prediction's Euler step and the test."""
    changes, reuses = [], []
    for sigma, following in pairwise(LEVELS):
        x = stepped(x, noise, following - sigma, changes, reuses)
    return x, torch.tensor(reuses)


def stepped(x, noise, span, changes, reuses):
    following = x + noise * span
    changes.append((following - x).abs().mean())
    reuse = False
    if len(changes) >= WARM_UP_STEPS:
        d0, d1, d2 = changes[-3:]
        capped = len(changes) - WARM_UP_STEPS > CAP_FREE_ENTRIES and all(reuses[-MAX_SKIP:])
        reuse = bool(((d0 + d2) / 2 - d1).abs() <= THRESHOLD * d1) and not capped
    reuses.append(float(reuse))
    return following


def our_steps(x, cond, uncond):
    return ours(x, keep_noise=True, denoised=cond, uncond=uncond, guidance=GUIDANCE)


def our_held_steps(x, noise):
    x, _, reuses = ours(x, newest=noise)
    return x, reuses


def ours(x, **prediction):
    state, reuses = torch.zeros(1, STATE_WIDTH, dtype=torch.float64, device=x.device), []
    for sigma, following in pairwise(LEVELS):
        x, noise, _, state = ops.solver_step(
            x, sigma, following, state=state, mode="official", threshold=THRESHOLD, max_skip=MAX_SKIP, **prediction
        )
        reuses.append(state.tolist()[0][REUSE])
    return x, noise, torch.tensor(reuses)


def workload(op, network, shape, inputs, eager, ours):
    """Of an op that is called step by step, with the host reading each step's decision: neither compiled nor captured."""
    return Workload(
        op, network, "x".join(map(str, shape)) + f", {len(LEVELS) - 1} steps", normals(inputs, shape), eager, ours,
        factor=8.0, compiled=False, captured=False, streams=False,
    )  # fmt: skip


WORKLOADS = [
    one
    for network, shape in SHAPES.items()
    for one in (
        Workload("third_order_difference", network, shape, normals(4, shape), difference, ops.third_order_difference, factor=8.0),
        workload("solver_step", network, shape, 3, published_steps, our_steps),
        workload("solver_step reused", network, shape, 2, held_steps, our_held_steps),
    )
] + [Workload("third_order_skip", "decisions", (64,), lambda: [torch.rand(64) for _ in range(3)], skip, ours_skip)]


def test_speed(case, measure):
    measure(case)
