"""Definitions: the steps samplers are made of."""

from __future__ import annotations

import torch
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
    sigma, sigma_next = (per_sample(level, x).double() for level in (sigma, sigma_next))
    kept, replaced = (sigma_next / sigma).to(dtype), ((sigma - sigma_next) / sigma).to(dtype)
    error = wide - guided
    # From the nearer end, so that a step to sigma_next = 0 is exactly D, and a short one loses nothing of x.
    from_x = kept > 0.5
    following = torch.where(from_x, wide, guided) + torch.where(from_x, -replaced, kept) * error
    return following.to(x.dtype), replaced.abs().flatten() * mean_per_sample(error.abs())
