"""Ways to learn a score from samples, side by side: exact and sliced score matching, finite differences, denoising, local smoothing.

Each function returns a loss for every sample, [B], whose minimiser over all functions is a score:

* `exact_score_matching`, `sliced_score_matching` and `finite_difference_score_matching`: that of the density x is drawn from; the three
  share the objective tr(ds/dx) + |s|^2 / 2 (Hyvärinen 2005) and differ in how they come by the trace.
* `denoising_score_matching` and `local_curvature_smoothing`: that of the density of x + sigma * noise. Neither differentiates the score.

`score` is any differentiable function [B, ...] -> [B, ...] that treats samples independently; noise levels, conditioning and weights are
the caller's. Everything here is plain PyTorch but for the noise and the loss of `local_curvature_smoothing`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from .._checks import check_choice, check_count, check_number

Score = Callable[[Tensor], Tensor]

PROJECTIONS = ("gaussian", "rademacher", "sphere")


def exact_score_matching(score: Score, x: Tensor) -> Tensor:
    """tr(ds/dx) + |s(x)|^2 / 2 for each sample (Hyvärinen 2005): one backward pass for every element of a sample.

    Args:
        score: [B, ...] -> [B, ...].
        x: samples [B, ...].
    """
    point, value = _differentiable(score, x)
    flat, trace = value.flatten(1), value.new_zeros(x.shape[0])
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), point, create_graph=True, materialize_grads=True)
        trace = trace + row.flatten(1)[:, i]
    return trace + _half_square(value)


def sliced_score_matching(
    score: Score, x: Tensor, *, projections: int = 1, law: str = "gaussian", generator: torch.Generator | None = None
) -> Tensor:
    """v^T (ds/dx) v + |s(x)|^2 / 2 with E[v v^T] = I: sliced score matching with reduced variance, SSM-VR (Song et al. 2019, eq. 8).

    One backward pass for every projection, and a backward pass through it.

    Args:
        score: [B, ...] -> [B, ...].
        x: samples [B, ...].
        projections: directions for every sample, whose mean is taken.
        law: of v: "gaussian", "rademacher" (+-1) or "sphere" (uniform on the sphere of radius sqrt(N)).
        generator: of the directions.
    """
    point, value = _differentiable(score, x)
    trace = value.new_zeros(x.shape[0])
    for _ in range(check_count(projections, "projections")):
        v = _directions(x, law, generator)
        (product,) = torch.autograd.grad(_dot(value, v).sum(), point, create_graph=True, materialize_grads=True)
        trace = trace + _dot(product, v)
    return trace / projections + _half_square(value)


def finite_difference_score_matching(
    score: Score, x: Tensor, *, radius: float | Tensor = 0.1, generator: torch.Generator | None = None
) -> Tensor:
    """N / (2 r^2) v^T (s(x + v) - s(x - v)) + |s(x + v) + s(x - v)|^2 / 8, v uniform on the sphere of radius r: FD-SSM (Pang et al. 2020).

    Two forward passes in one batch and no second derivative; biased by O(r^2).

    Args:
        score: [B, ...] -> [B, ...].
        x: samples [B, ...].
        radius: r > 0, a number or [B], well below the scale on which the score bends.
        generator: of the directions.
    """
    size, elements = _column(radius, "radius", x), max(x[0].numel(), 1) if x.shape[0] else 1
    v = _directions(x, "sphere", generator) * (size / elements**0.5)
    plus, minus = score(torch.cat((x + v, x - v))).chunk(2)
    trace = elements * _dot(v / size.square(), plus - minus) / 2
    return trace + (plus + minus).flatten(1).square().sum(1) / 8


def denoising_score_matching(score: Score, x: Tensor, sigma: float | Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """|s(x + sigma z) + z / sigma|^2 / 2 (Vincent 2011): one forward pass.

    Args:
        score: [B, ...] -> [B, ...].
        x: clean samples [B, ...].
        sigma: noise level > 0, a number or [B].
        generator: of the noise z.
    """
    z, level = _normals(x, generator), _column(sigma, "sigma", x)
    return _half_square(score(x + level * z) + z / level)


def local_curvature_smoothing(
    score: Score, x: Tensor, sigma: float | Tensor, seed: int | Tensor, *, gamma: float = 1.0, antithetic: bool = False
) -> Tensor:
    """gamma / sigma <s(x + sigma z), z> + |s(x + sigma z)|^2 / 2 (LCSS; Osada, Shing, Nishide 2024): Stein's identity for the trace.

    One forward pass, whose noise is made again in the loss and never stored. With `antithetic` the mean over z and -z, two passes in one
    batch: their difference is a central finite difference, and the variance stays bounded as sigma falls.

    Args:
        score: [B, ...] -> [B, ...].
        x: samples [B, ...], clean or noisy.
        sigma: of the smoothing, > 0, a number or [B].
        seed: of z.
        gamma: weight of the trace; 1 is unbiased.
        antithetic: see above.
    """
    plus = ops.lcss_perturb(x, sigma, seed)
    if not antithetic:
        return ops.lcss_loss(score(plus), seed, sigma, gamma=gamma)
    minus = ops.lcss_perturb(x, sigma, seed, mirrored=True)
    s_plus, s_minus = score(torch.cat((plus, minus))).chunk(2)
    return ops.lcss_loss(s_plus, seed, sigma, gamma=gamma, mirrored=s_minus)


def _differentiable(score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf at x and the score there."""
    point = x.detach().requires_grad_()
    return point, score(point)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _half_square(value: Tensor) -> Tensor:
    return 0.5 * value.flatten(1).square().sum(1)


def _column(value: float | Tensor, name: str, like: Tensor) -> Tensor:
    """A number or [B], finite and above zero, that broadcasts against [B, ...]."""
    if not isinstance(value, Tensor):
        return torch.full((1,) * like.dim(), check_number(value, name, above=0.0), dtype=like.dtype, device=like.device)
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != like.shape[0]):
        raise ValueError(f"{name} must be a number or a tensor [{like.shape[0]}], got shape {list(value.shape)}")
    if not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError(f"{name} must be finite and > 0.0, got {value.tolist()}")
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _normals(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _directions(like: Tensor, law: str, generator: torch.Generator | None) -> Tensor:
    """Random directions with E[v v^T] = I, [B, ...]."""
    z = _normals(like, generator)
    if check_choice(law, "law", PROJECTIONS) == "rademacher":
        return torch.where(z < 0, -torch.ones_like(z), torch.ones_like(z))
    if law == "sphere":
        flat = z.flatten(1)
        return (flat * (flat.shape[1] ** 0.5 / flat.norm(dim=1, keepdim=True))).reshape(z.shape)
    return z
