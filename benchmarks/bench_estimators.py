"""A training step by each way to learn a score: time and peak memory of the loss and its gradients, on a small network for 8 x 8 digits.

Eager is local curvature smoothing (LCSS) in PyTorch, with noise that it draws and keeps; ours makes the noise again where it is used. The
others have other losses, each held to its own formula: the exact trace, sliced score matching (SSM-VR), its finite differences (FD-SSM) and
denoising (DSM).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.shapes import GPU
from benchmarks.workloads import Variant, Workload
from fastdiff_kernels import ops
from fastdiff_kernels.distill import score_estimators as estimators

SHAPE = (512 if GPU else 32, 1, 8, 8)
CHANNELS, LAYERS = 32, 3
SIGMA, RADIUS, SEED = 0.5, 0.05, 7

Loss = Callable[[nn.Module, Tensor], Tensor]


@functools.cache
def network(dtype: torch.dtype, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    hidden = [layer for _ in range(LAYERS) for layer in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.SiLU())]
    layers = nn.Conv2d(1, CHANNELS, 3, padding=1), nn.SiLU(), *hidden, nn.Conv2d(CHANNELS, 1, 3, padding=1)
    return nn.Sequential(*layers).to(device, dtype)


def step(loss: Loss) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The mean loss and its gradient by all parameters."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        score = network(x.dtype, x.device)
        with torch.enable_grad():
            value = loss(score, x).mean()
            gradients = torch.autograd.grad(value, list(score.parameters()), allow_unused=True, materialize_grads=True)
        return value.detach(), torch.cat([g.flatten() for g in gradients])

    return run


def generator(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(SEED)


def drawn(x: Tensor) -> Tensor:
    """The normals that an estimator draws beside float32 samples."""
    return torch.randn(x.shape, device=x.device, generator=generator(x)).to(x.dtype)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def lcss(score: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    s = score(x + SIGMA * z)
    return dot(s, z) / SIGMA + dot(s, s) / 2


def trace(score: nn.Module, x: Tensor) -> Tensor:
    def jacobian(one: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(score, one.unsqueeze(0), create_graph=True).reshape(one.numel(), -1)

    s = score(x)
    return torch.stack([jacobian(one).trace() for one in x]) + dot(s, s) / 2


def sliced(score: nn.Module, x: Tensor) -> Tensor:
    v = drawn(x)
    s, product = torch.func.jvp(score, (x,), (v,))
    return dot(product, v) + dot(s, s) / 2


def finite_differences(score: nn.Module, x: Tensor) -> Tensor:
    z = drawn(x).flatten(1)
    v = (RADIUS * z / z.norm(dim=1, keepdim=True)).reshape(x.shape)
    plus, minus = score(x + v), score(x - v)
    return x[0].numel() / (2 * RADIUS**2) * dot(v, plus - minus) + dot(plus + minus, plus + minus) / 8


def denoising(score: nn.Module, x: Tensor) -> Tensor:
    z = drawn(x)
    error = score(x + SIGMA * z) + z / SIGMA
    return dot(error, error) / 2


def pairs(score: nn.Module, x: Tensor) -> Tensor:
    z = ops.lcss_noise(x, SEED)
    return (lcss(score, x, z) + lcss(score, x, -z)) / 2


def variant(run: Loss, definition: Loss) -> Variant:
    return Variant(step(run), step(definition))


WORKLOADS = [
    Workload(
        "score estimators", "digits", SHAPE, lambda: [torch.randn(SHAPE)],
        step(lambda score, x: lcss(score, x, torch.randn_like(x))),
        step(lambda score, x: estimators.local_curvature_smoothing(score, x, SIGMA, SEED)),
        checkable=step(lambda score, x: lcss(score, x, ops.lcss_noise(x, SEED))),
        variants={
            "ours, pairs": variant(lambda score, x: estimators.local_curvature_smoothing(score, x, SIGMA, SEED, antithetic=True), pairs),
            "exact trace": variant(estimators.exact_score_matching, trace),
            "SSM-VR": variant(lambda score, x: estimators.sliced_score_matching(score, x, generator=generator(x)), sliced),
            "FD-SSM": variant(
                lambda score, x: estimators.finite_difference_score_matching(score, x, radius=RADIUS, generator=generator(x)),
                finite_differences,
            ),
            "DSM": variant(lambda score, x: estimators.denoising_score_matching(score, x, SIGMA, generator=generator(x)), denoising),
        },
        streams=False, captured=False, compiled=False, factor=8.0, dtypes=(torch.float32,),
    )
]  # fmt: skip


def test_speed(case, measure):
    measure(case)
