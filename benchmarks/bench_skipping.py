"""Criteria of AdaptiveDiffusion, and ten solver steps that end in one, on latents of Stable Diffusion's size and on 256 x 256 pixels.

What a criterion costs is the difference between "solver_step deciding", whose decisions stay on the device, and "solver_step undecided",
the same ten steps without one. In "solver_step" and "solver_step reused" the host reads each decision, as it must before the next call of a
network.
"""

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
        before, (x, noise) = x, guided_step(x, cond, uncond, sigma, following)
        reuses.append(float(decision(before, x, changes) and not capped(changes, reuses)))
    return x, noise, torch.tensor(reuses)


def deciding_steps(x, cond, uncond):
    """The same, of which the host reads nothing; the last decision."""
    changes = []
    for sigma, following in pairwise(LEVELS):
        before, (x, noise) = x, guided_step(x, cond, uncond, sigma, following)
        reuse = decision(before, x, changes)
    return x, noise, reuse.to(x.dtype)


def undecided_steps(x, cond, uncond):
    for sigma, following in pairwise(LEVELS):
        x, noise = guided_step(x, cond, uncond, sigma, following)
    return x, noise


def held_steps(x, noise):
    """Reused steps: the held prediction's Euler step and the test."""
    changes, reuses = [], []
    for sigma, following in pairwise(LEVELS):
        before, x = x, x + noise * (following - sigma)
        reuses.append(float(decision(before, x, changes) and not capped(changes, reuses)))
    return x, torch.tensor(reuses)


def guided_step(x, cond, uncond, sigma, following):
    denoised = uncond + GUIDANCE * (cond - uncond)
    noise = (x - denoised) / sigma
    return x + noise * (following - sigma), noise


def decision(x, following, changes):
    """The published test on the mean changes so far, on the device."""
    changes.append((following - x).abs().mean())
    if len(changes) < WARM_UP_STEPS:
        return torch.zeros_like(changes[-1], dtype=torch.bool)
    d0, d1, d2 = changes[-3:]
    return ((d0 + d2) / 2 - d1).abs() <= THRESHOLD * d1


def capped(changes, reuses):
    return len(changes) - WARM_UP_STEPS > CAP_FREE_ENTRIES and all(reuses[-MAX_SKIP:])


def our_steps(x, cond, uncond):
    reuses = []
    x, noise, _ = ours(x, lambda state: reuses.append(state.tolist()[0][REUSE]), **guided(cond, uncond))
    return x, noise, torch.tensor(reuses)


def our_held_steps(x, noise):
    reuses = []
    x, *_ = ours(x, lambda state: reuses.append(state.tolist()[0][REUSE]), newest=noise)
    return x, torch.tensor(reuses)


def our_deciding_steps(x, cond, uncond):
    # No trajectory here is as long as this cap.
    x, noise, state = ours(x, **guided(cond, uncond), max_skip=len(LEVELS))
    return x, noise, state[0, REUSE]


def our_undecided_steps(x, cond, uncond):
    for sigma, following in pairwise(LEVELS):
        x, noise, *_ = ops.solver_step(x, sigma, following, **guided(cond, uncond))
    return x, noise


def guided(cond, uncond):
    return {"keep_noise": True, "denoised": cond, "uncond": uncond, "guidance": GUIDANCE}


def ours(x, read=lambda state: None, max_skip=MAX_SKIP, **prediction):
    state = torch.zeros(1, STATE_WIDTH, dtype=torch.float64, device=x.device)
    for sigma, following in pairwise(LEVELS):
        x, noise, _, state = ops.solver_step(
            x, sigma, following, state=state, mode="official", threshold=THRESHOLD, max_skip=max_skip, **prediction
        )
        read(state)
    return x, noise, state


def workload(op, network, shape, inputs, eager, ours, captured=False):
    """Of an op that is called step by step, which nobody compiles; a GPU can capture it unless the host reads each step's decision."""
    return Workload(
        op, network, "x".join(map(str, shape)) + f", {len(LEVELS) - 1} steps", normals(inputs, shape), eager, ours,
        factor=8.0, compiled=False, captured=captured, streams=False,
    )  # fmt: skip


WORKLOADS = [
    one
    for network, shape in SHAPES.items()
    for one in (
        Workload("third_order_difference", network, shape, normals(4, shape), difference, ops.third_order_difference, factor=8.0),
        workload("solver_step", network, shape, 3, published_steps, our_steps),
        workload("solver_step reused", network, shape, 2, held_steps, our_held_steps),
        workload("solver_step deciding", network, shape, 3, deciding_steps, our_deciding_steps, captured=True),
        workload("solver_step undecided", network, shape, 3, undecided_steps, our_undecided_steps, captured=True),
    )
] + [Workload("third_order_skip", "decisions", (64,), lambda: [torch.rand(64) for _ in range(3)], skip, ours_skip)]


def test_speed(case, measure):
    measure(case)
