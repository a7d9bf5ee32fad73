"""What it costs a sampler to go from one noise level to the next, estimated from a score network, one number a sample."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from .._checks import check_positive
from .guidance import map_tensors

# Of the solver for the inverse Jacobian of an Euler step.
_ITERATIONS = 8


class RawDenoiser(Protocol):
    """What schedules are optimised with; `EDMPrecond` is one."""

    sigma_data: float

    def raw(self, x: Tensor, sigma: Tensor, **conditioning: object) -> Tensor:
        """The network output F under EDM preconditioning, at the unscaled x."""


def check_denoiser(denoiser: object) -> None:
    """TypeError or ValueError unless it offers `.raw` and a positive `.sigma_data`."""
    for attribute in ("raw", "sigma_data"):
        if not hasattr(denoiser, attribute):
            raise TypeError(
                f"denoiser must offer .raw(x, sigma) and .sigma_data, as EDMPrecond does; {type(denoiser).__name__} has no .{attribute}"
            )
    check_positive(denoiser.sigma_data, "denoiser.sigma_data")  # type: ignore[attr-defined]


@torch.no_grad()
def corrector_costs(
    denoiser: RawDenoiser, clean: Tensor, conditioning: dict[str, object], low: float, high: float, seed: int, offset: int
) -> Tensor:
    """low^2 |s(x, low) - s(x, high)|^2 at x = clean + high noise, [B]: the work of a Langevin corrector of velocity sigma entering `low`.

    Both levels see the same x, in one network call on 2 B rows. The noise is that of `seed`, of samples `offset` and on.
    """
    # An inner level is one of two intervals, and cannot share an evaluation between them: each takes its mean over the law of its own
    # noisier end, so that the two points differ even where data and noise are the same.
    x = ops.lcss_perturb(clean, high, seed, offset=offset)
    dtype = torch.promote_types(x.dtype, torch.float32)
    sigma = torch.tensor([low, high], dtype=dtype, device=x.device).repeat_interleave(len(x))  # [2 B]
    twice = map_tensors(lambda value: torch.cat((value, value)), conditioning)
    raw_low, raw_high = denoiser.raw(torch.cat((x, x)), sigma, **twice).chunk(2)
    return ops.incremental_cost(x, raw_low, raw_high, low, high, sigma_data=denoiser.sigma_data)  # [B]


def predictor_costs(
    denoiser: RawDenoiser, clean: Tensor, conditioning: dict[str, object], low: float, high: float, seed: int, offset: int, probes: int = 2
) -> Tensor:
    """low^2 |score of (F moved p_high) - s(., low)|^2 at F(x), x = clean + high noise, [B]: what an Euler step F leaves to be corrected.

    F(x) = x - (low - high) high s(x, high) moves p_high's score to ::

        J^-T (s(x, high) - grad log |det J|),   J = dF/dx,   grad log |det J| = -(low - high) high E_v grad_x [J^-T v]^T (ds/dx) v

    with [.] held fixed and v of random signs. Products of different probes v are unbiased estimates of the square, and so may be negative.
    Needs a network that is twice differentiable, and takes some 16 vector-Jacobian products a probe.
    """
    x = ops.lcss_perturb(clean, high, seed, offset=offset)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        score = _score(denoiser, x, high, conditioning)
        reach = (low - high) * high
        generator = torch.Generator().manual_seed(seed + 7919 * (offset + 1))
        moved_scores = []
        for _ in range(probes):
            signs = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
            weights = _inverse_transposed(score, x, signs, reach)
            curvature = torch.autograd.grad(score, x, weights, create_graph=True)[0]  # (ds/dx)^T w, whose product with v is w^T (ds/dx) v
            log_det = -reach * _gradient((curvature * signs).sum(), x)
            moved_scores.append(_inverse_transposed(score, x, (score - log_det).detach(), reach))
    with torch.no_grad():
        entered = _score(denoiser, x - reach * score, low, conditioning)
        residuals = torch.stack([entered - moved for moved in moved_scores]).flatten(2).double()  # [probes, B, elements]
        pairs = residuals.sum(0).square().sum(1) - residuals.square().sum(dim=(0, 2))
        return low**2 * pairs / (probes * (probes - 1))


def _score(denoiser: RawDenoiser, x: Tensor, sigma: float, conditioning: dict[str, object]) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    raw = denoiser.raw(x, torch.full((len(x),), sigma, dtype=dtype, device=x.device), **conditioning)
    variance = sigma**2 + denoiser.sigma_data**2
    return denoiser.sigma_data / (sigma * variance**0.5) * raw - x / variance


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    # The score of a Gaussian is linear: its derivative no longer depends on x.
    if not value.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(value, x, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


def _inverse_transposed(score: Tensor, x: Tensor, vector: Tensor, reach: float) -> Tensor:
    """(I - reach ds/dx)^-T vector, sample by sample, by generalised conjugate residuals: exact after as many as ds/dx has eigenvalues."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))

    solution, residual = torch.zeros_like(vector), vector
    directions: list[tuple[Tensor, Tensor, Tensor]] = []
    tiny = torch.finfo(x.dtype).tiny
    for _ in range(_ITERATIONS):
        step = residual
        image = step - reach * torch.autograd.grad(score, x, step, retain_graph=True)[0]
        for past, past_image, square in directions:
            share = dot(image, past_image) / square
            step, image = step - share * past, image - share * past_image
        # A sample that is solved already has a residual of 0, and stays.
        square = dot(image, image).clamp(min=tiny)
        directions.append((step, image, square))
        advance = dot(residual, image) / square
        solution, residual = solution + advance * step, residual - advance * image
    return solution.detach()
