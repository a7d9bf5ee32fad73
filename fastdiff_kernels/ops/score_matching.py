"""Local curvature smoothing with Stein's identity (LCSS; Osada et al., arXiv 2412.03962) and denoising score matching."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import bind
from ._checks import check_count, check_like, check_noise_size, check_seed, check_tensor, per_sample

_lcss_noise = bind("lcss_noise")
_lcss_perturb = bind("lcss_perturb")
_lcss_loss = bind("lcss_loss")
_lcss_loss_seeded = bind("lcss_loss_seeded")
_denoising_loss = bind("denoising_loss")


def lcss_noise(x: Tensor, seed: int | Tensor, *, offset: int = 0) -> Tensor:
    """Standard normals that depend on (seed, sample, element) alone.

    Philox 4x32-10 and Box-Muller in float32, keyed by the seed, offset + sample index and row-major element index, rounded to x's dtype.
    Independent of strides, dtype, sample length, batch split and device (the integers exactly, the normals to 2 ulp).

    Args:
        x: [B, ...], any floating dtype and layout; only its shape, dtype and device matter.
        seed: int, or a 0-d int64 tensor (no recompilation, safe in CUDA graphs).
        offset: index of the first sample, at least 0; keeps ranks and micro-batches apart.

    Returns:
        [B, ...] contiguous, x's dtype.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    check_tensor("lcss_noise", "x", x)
    check_noise_size("lcss_noise", "x", x)
    return _lcss_noise(x, check_seed("lcss_noise", seed, x), check_count("lcss_noise", "offset", offset, 0))


def lcss_perturb(x: Tensor, sigma: float | Tensor, seed: int | Tensor, *, offset: int = 0, mirrored: bool = False) -> Tensor:
    """x + sigma * noise, with the noise of `lcss_noise` before it is rounded; it is never stored.

    Args:
        x: [B, ...], float32, bfloat16, float16 or float64. A layout other than contiguous is copied once.
        sigma: standard deviation, at least 0: float, 0-d tensor or [B], float32 or float64, in x's units.
        seed, offset: as in `lcss_noise`.
        mirrored: x - sigma * noise instead, the other half of an antithetic pair.

    Returns:
        [B, ...] contiguous, x's dtype. Differentiable in x.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; sigma must not require grad.
    """
    check_tensor("lcss_perturb", "x", x)
    check_noise_size("lcss_perturb", "x", x)
    sigma = per_sample("lcss_perturb", "sigma", sigma, x, at_least=0)
    sigma = -sigma if mirrored else sigma
    return _lcss_perturb(x, sigma, check_seed("lcss_perturb", seed, x), check_count("lcss_perturb", "offset", offset, 0))


def lcss_loss(
    score: Tensor,
    noise: int | Tensor,
    sigma: float | Tensor,
    *,
    gamma: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
    offset: int = 0,
    mirrored: Tensor | None = None,
) -> Tensor:
    """weight * (gamma / sigma * <score, noise> + |score|^2 / 2) for each sample: score matching with no Jacobian trace.

    For score = s(x + sigma * noise) its mean over the noise is, by Stein's identity, that of gamma * tr(ds/dx) + |s|^2 / 2 over the
    Gaussian N(x, sigma^2 I) (arXiv 2412.03962). gamma = 1 is the unbiased objective, whose minimiser is the score of the smoothed data.

    With mirrored = s(x - sigma * noise) it is the mean over the antithetic pair,

        weight * (gamma / (2 sigma) * <score - mirrored, noise> + (|score|^2 + |mirrored|^2) / 4),

    whose first term is a central difference: its variance stays bounded for small sigma, where that of the plain one grows as 1 / sigma^2.

    Where a gradient will be asked for it is written in the same pass; backward only multiplies it by the loss's own, and not even that
    where that is 1. A constant factor therefore costs least inside `weight`, beside `.sum()`. (float16 makes it in a second pass, since
    without the factor of a loss scaler it would underflow.)

    Args:
        score: [B, ...], float32, bfloat16, float16 or float64. A layout other than contiguous is copied once.
        noise: the standard normals that perturbed the input, like score; or the seed that `lcss_perturb` was given (an int or a 0-d
            int64 tensor): the kernel then makes them again, unrounded, and nothing is stored.
        sigma: standard deviation of the perturbation, greater than 0: float, 0-d tensor or [B], float32 or float64.
        gamma, weight: finite constants, of the forms of sigma.
        offset: index of the first sample, for a seed; must be 0 beside a noise tensor.
        mirrored: like score: the score at the mirrored point, `lcss_perturb(..., mirrored=True)`.

    Returns:
        [B], float32 (float64 for float64 inputs). Differentiable in score and mirrored, and in noise when that is a tensor.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; sigma, gamma and weight must not require grad.
    """
    op = "lcss_loss"
    check_tensor(op, "score", score)
    sigma = per_sample(op, "sigma", sigma, score, above=0)
    gamma, weight = per_sample(op, "gamma", gamma, score), per_sample(op, "weight", weight, score)
    if mirrored is not None:
        check_like(op, "mirrored", mirrored, "score", score)
    if isinstance(noise, Tensor) and (noise.dim() > 0 or noise.is_floating_point()):
        check_like(op, "noise", noise, "score", score)
        if offset != 0:
            raise ValueError(f"{op}: offset belongs to a seed and must be 0 beside a noise tensor; got {offset}")
        return _lcss_loss(score, noise, mirrored, sigma, gamma, weight)
    check_noise_size(op, "score", score)
    seed = check_seed(op, noise, score, "noise", "a tensor like score, ")
    offset = check_count(op, "offset", offset, 0)
    return _lcss_loss_seeded(score, seed, mirrored, sigma, gamma, weight, offset)


def denoising_loss(denoised: Tensor, clean: Tensor, *, weight: float | Tensor = 1.0) -> Tensor:
    """weight * |denoised - clean|^2 for each sample (Vincent, 2011; Karras et al., arXiv 2206.00364, eq. 2).

    Args:
        denoised: [B, ...], float32, bfloat16, float16 or float64. A layout other than contiguous is copied once.
        clean: like denoised.
        weight: finite constant: float, 0-d tensor or [B], float32 or float64.

    Returns:
        [B], float32 (float64 for float64 inputs). Differentiable in denoised and clean.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; weight must not require grad.
    """
    check_tensor("denoising_loss", "denoised", denoised)
    check_like("denoising_loss", "clean", clean, "denoised", denoised)
    return _denoising_loss(denoised, clean, per_sample("denoising_loss", "weight", weight, denoised))
