"""Definitions: local curvature smoothing with Stein's identity (LCSS) and denoising score matching."""

from __future__ import annotations

from torch import Tensor

from ._common import compute_dtype, per_sample, sum_per_sample
from .philox import normals


def lcss_noise(x: Tensor, seed: int | Tensor, offset: int = 0) -> Tensor:
    """Standard normals of x's shape and dtype."""
    return normals(x.shape, seed, offset, "lcss", x.device).to(compute_dtype(x)).to(x.dtype)


def lcss_perturb(x: Tensor, sigma: float | Tensor, seed: int | Tensor, offset: int = 0) -> Tensor:
    """x + sigma * noise for x [B, ...], with the noise that lcss_noise gives."""
    dtype = compute_dtype(x)
    noise = normals(x.shape, seed, offset, "lcss", x.device).to(dtype)
    return (x.to(dtype) + per_sample(sigma, x) * noise).to(x.dtype)


def lcss_loss_stored(
    score: Tensor,
    noise: Tensor,
    mirrored: Tensor | None,
    sigma: float | Tensor,
    gamma: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
) -> Tensor:
    """weight * (gamma / sigma * <score, noise> + |score|^2 / 2) for each sample; with `mirrored` its mean with (mirrored, -noise)."""
    dtype = compute_dtype(score)
    score, noise = score.to(dtype), noise.to(dtype)
    difference, squares, half = score, score.square(), 0.5
    if mirrored is not None:
        mirrored = mirrored.to(dtype)
        difference, squares, half = 0.5 * (score - mirrored), squares + mirrored.square(), 0.25
    product = sum_per_sample(difference * noise)
    stein = per_sample(gamma, product) / per_sample(sigma, product) * product
    return per_sample(weight, product) * (stein + half * sum_per_sample(squares))


def lcss_loss_seeded(
    score: Tensor,
    seed: int | Tensor,
    mirrored: Tensor | None,
    sigma: float | Tensor,
    gamma: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    offset: int = 0,
) -> Tensor:
    """lcss_loss_stored with the unrounded noise that the seed gives."""
    noise = normals(score.shape, seed, offset, "lcss", score.device)
    return lcss_loss_stored(score, noise, mirrored, sigma, gamma, weight)


def denoising_loss(denoised: Tensor, clean: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """weight * |denoised - clean|^2 for each sample."""
    dtype = compute_dtype(denoised)
    squares = sum_per_sample((denoised.to(dtype) - clean.to(dtype)).square())
    return per_sample(weight, squares) * squares
