"""The steps samplers are made of: ancestral sampling's posterior (Ho et al., arXiv 2006.11239) and the guided Euler step."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import bind
from ._checks import check_count, check_like, check_noise_size, check_seed, check_tensor, per_sample, readable

_posterior_sample = bind("posterior_sample")
_guided_step = bind("guided_step")


def posterior_sample(
    denoised: Tensor,
    noisy: Tensor,
    sigma_s: float | Tensor,
    sigma_t: float | Tensor,
    seed: int | Tensor,
    *,
    offset: int = 0,
) -> Tensor:
    """z_s ~ q(z_s | z_t, x0 = denoised) of the variance-exploding process: r z_t + (1 - r) denoised + sigma_s sqrt(1 - r) noise.

    r = (sigma_s / sigma_t)^2; 1 - r is formed as (sigma_t - sigma_s)(sigma_t + sigma_s) / sigma_t^2 in float64, which does not cancel when
    the levels are close. The noise is that of `lcss_noise` in a stream of its own: one seed serves both. sigma_s = 0 returns denoised and
    sigma_s = sigma_t returns noisy, exactly. One transition of ancestral sampling (arXiv 2406.04103, Algorithm 1).

    Args:
        denoised: [B, ...], E[x0 | z_t] or a generator's estimate; float32, bfloat16, float16 or float64. A layout other than contiguous is
            copied once.
        noisy: z_t, like denoised.
        sigma_s: the noise level to go to, 0 <= sigma_s <= sigma_t: float, 0-d tensor or [B], float32 or float64.
        sigma_t: the noise level of noisy, greater than 0, of the forms of sigma_s.
        seed: int, or a 0-d int64 tensor.
        offset: index of the first sample, at least 0.

    Returns:
        [B, ...] contiguous, denoised's dtype. Differentiable in denoised and noisy.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; sigma_s and sigma_t must not require grad.
    """
    op = "posterior_sample"
    check_tensor(op, "denoised", denoised)
    check_like(op, "noisy", noisy, "denoised", denoised)
    check_noise_size(op, "denoised", denoised)
    levels = per_sample(op, "sigma_s", sigma_s, denoised, at_least=0), per_sample(op, "sigma_t", sigma_t, denoised, above=0)
    _check_order(op, sigma_s, sigma_t, *levels)
    return _posterior_sample(denoised, noisy, *levels, check_seed(op, seed, denoised), check_count(op, "offset", offset, 0))


def _check_order(op: str, sigma_s: float | Tensor, sigma_t: float | Tensor, level_s: Tensor, level_t: Tensor) -> None:
    if isinstance(sigma_s, Tensor) or isinstance(sigma_t, Tensor):
        wrong = readable(level_s) and readable(level_t) and bool((level_s > level_t).any())
    else:
        wrong = sigma_s > sigma_t
    if wrong:
        raise ValueError(f"{op}: sigma_s must be at most sigma_t; got sigma_s = {sigma_s}, sigma_t = {sigma_t}")


def guided_step(
    x: Tensor,
    denoised: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    uncond: Tensor | None = None,
    guidance: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """One Euler step of dx/dsigma = (x - D) / sigma with classifier-free guidance, and how far it went, in one pass.

    D = uncond + guidance * (denoised - uncond), or denoised without uncond (Ho and Salimans, arXiv 2207.12598)
    x_next = x + (sigma_next - sigma) (x - D) / sigma = (sigma_next / sigma) x + (1 - sigma_next / sigma) D
    change = mean |x_next - x| over a sample's elements, accumulated before x_next is rounded (what step skipping watches)

    A step to sigma_next = 0 returns D.

    Args:
        x: [B, ...], float32, bfloat16, float16 or float64. A layout other than contiguous is copied once.
        denoised: like x: the denoiser's output under the condition.
        sigma: the noise level of x, greater than 0: float, 0-d tensor or [B], float32 or float64.
        sigma_next: the level to go to, at least 0, of the forms of sigma.
        uncond: like x: the denoiser's output without the condition; None is no guidance.
        guidance: finite, of the forms of sigma; must be left at 1 without uncond.

    Returns:
        x_next [B, ...] contiguous, x's dtype; change [B], float32 (float64 for float64 inputs).
        Both differentiable in x, denoised and uncond.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; sigma, sigma_next and guidance must not require grad.
    """
    op = "guided_step"
    check_tensor(op, "x", x)
    check_like(op, "denoised", denoised, "x", x)
    if uncond is not None:
        check_like(op, "uncond", uncond, "x", x)
    elif isinstance(guidance, Tensor) or guidance != 1:
        raise ValueError(f"{op}: guidance needs uncond, which is None; got guidance = {guidance}")
    sigma, sigma_next = per_sample(op, "sigma", sigma, x, above=0), per_sample(op, "sigma_next", sigma_next, x, at_least=0)
    return _guided_step(x, denoised, sigma, sigma_next, uncond, per_sample(op, "guidance", guidance, x))
