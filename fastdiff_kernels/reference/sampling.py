"""Definitions: the steps samplers are made of."""

from __future__ import annotations

from torch import Tensor

from ._common import compute_dtype, mean_per_sample, per_sample
from .philox import normals


def posterior_sample(
    denoised: Tensor,
    noisy: Tensor,
    sigma_s: float | Tensor,
    sigma_t: float | Tensor,
    seed: int | Tensor,
    offset: int = 0,
) -> Tensor:
    """z_s ~ q(z_s | z_t, denoised): r z_t + (1 - r) denoised + sigma_s sqrt(1 - r) noise, r = (sigma_s / sigma_t)^2."""
    dtype = compute_dtype(denoised)
    sigma_s, sigma_t = (per_sample(sigma, denoised).double() for sigma in (sigma_s, sigma_t))
    kept = (sigma_s / sigma_t).square()
    # 1 - r cancels when sigma_s is close to sigma_t; this product does not.
    forgotten = (sigma_t - sigma_s) * (sigma_t + sigma_s) / (sigma_t * sigma_t)
    spread = sigma_s * forgotten.sqrt()
    kept, forgotten, spread = (constant.to(dtype) for constant in (kept, forgotten, spread))
    noise = normals(denoised.shape, seed, offset, "posterior", denoised.device).to(dtype)
    return (kept * noisy.to(dtype) + forgotten * denoised.to(dtype) + spread * noise).to(denoised.dtype)


def guided_step(
    x: Tensor,
    denoised: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """D = uncond + guidance (denoised - uncond); x_next = x + (sigma_next - sigma) (x - D) / sigma; (x_next, mean |x_next - x|)."""
    dtype = compute_dtype(x)
    guided, wide = denoised.to(dtype), x.to(dtype)
    if uncond is not None:
        uncond = uncond.to(dtype)
        guided = uncond + per_sample(guidance, x) * (guided - uncond)
    sigma, sigma_next = per_sample(sigma, x), per_sample(sigma_next, x)
    kept, replaced = sigma_next / sigma, (sigma - sigma_next) / sigma
    # As a weighted mean the step ends exactly in D at sigma_next = 0, where adding a change to a large x would lose D's last digits.
    change = replaced * (guided - wide)
    return (kept * wide + replaced * guided).to(x.dtype), mean_per_sample(change.abs())
