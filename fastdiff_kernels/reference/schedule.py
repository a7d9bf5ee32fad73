"""Definitions: the cost of moving between noise levels, and the schedule that spreads it evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype, sum_per_sample

COST_FLOOR = 1e-12


def _wide(sigma: float | Tensor, like: Tensor) -> Tensor:
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=like.device)
    return sigma.reshape(-1, *[1] * (like.dim() - 1)) if sigma.dim() else sigma


def incremental_cost(
    x: Tensor,
    raw_low: Tensor,
    raw_high: Tensor,
    sigma_low: float | Tensor,
    sigma_high: float | Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """sigma_low^2 |s(x, sigma_low) - s(x, sigma_high)|^2 for each sample, with s = b F - x / (sigma^2 + sigma_data^2).

    b = sigma_data / (sigma sqrt(sigma^2 + sigma_data^2)), F being what the network gives at the same x for either level.
    """
    dtype = compute_dtype(x)
    low, high = _wide(sigma_low, x), _wide(sigma_high, x)
    variance_low, variance_high = low.square() + sigma_data**2, high.square() + sigma_data**2
    # In float64, since the two levels of a fine grid nearly cancel. So do the outputs, whose difference is exact where they are close.
    raw_factor = sigma_data / variance_low.sqrt()
    high_factor = raw_factor - low / high * (sigma_data / variance_high.sqrt())
    x_factor = low * (high - low) * (high + low) / (variance_low * variance_high)
    raw_low, raw_high = raw_low.to(dtype), raw_high.to(dtype)
    change = high_factor.to(dtype) * raw_high - x_factor.to(dtype) * x.to(dtype)
    return sum_per_sample((raw_factor.to(dtype) * (raw_low - raw_high) + change).square())


def _pchip_slopes(widths: Tensor, secants: Tensor) -> Tensor:
    """Fritsch-Carlson slopes at the knots (Fritsch & Butland's weighted harmonic mean inside, one-sided at the ends)."""
    if secants.shape[-1] == 1:
        return torch.cat((secants, secants), -1)
    left, right = widths[..., :-1], widths[..., 1:]
    weight_left, weight_right = left + 2 * right, 2 * left + right
    inner = (weight_left + weight_right) / (weight_left / secants[..., :-1] + weight_right / secants[..., 1:])

    def end(h0: Tensor, h1: Tensor, s0: Tensor, s1: Tensor) -> Tensor:
        # The secants have one sign, so the slope is less than twice the first; it only has to be kept from turning back.
        slope = ((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1)
        return torch.where(slope * s0 > 0, slope, torch.zeros_like(slope))

    first = end(widths[..., 0], widths[..., 1], secants[..., 0], secants[..., 1])
    last = end(widths[..., -1], widths[..., -2], secants[..., -1], secants[..., -2])
    return torch.cat((first[..., None], inner, last[..., None]), -1)


def _valid(sigmas: Tensor, costs: Tensor) -> Tensor:
    rises = sigmas.diff(dim=-1)
    monotone = (rises > 0).all(-1, keepdim=True) | (rises < 0).all(-1, keepdim=True)
    finite = torch.isfinite(sigmas).all(-1, keepdim=True) & torch.isfinite(costs).all(-1, keepdim=True)
    return monotone & finite & (costs >= 0).all(-1, keepdim=True) & (costs > 0).any(-1, keepdim=True)


def integrate_schedule(sigmas: Tensor, costs: Tensor, num_steps: int, interpolation: str = "pchip") -> Tensor:
    """Levels at which the running sum of sqrt(cost) is i / num_steps of its total, i = 0 ... num_steps.

    sigmas [..., K + 1] strictly monotone, costs [..., K] >= 0, floored at 1e-12 of their largest so that the sum is invertible. NaN for
    a schedule whose knots are not strictly monotone or whose costs are negative, not finite or all zero.
    """
    dtype = sigmas.dtype
    sigmas, costs = sigmas.double(), costs.double()
    floor = (COST_FLOOR * costs.amax(-1, keepdim=True)).clamp_min(torch.finfo(torch.float64).tiny)
    widths = costs.clamp_min(floor).sqrt()  # [..., K]
    length = torch.cat((torch.zeros_like(widths[..., :1]), widths.cumsum(-1)), -1)  # [..., K + 1]
    fractions = torch.arange(num_steps + 1, device=sigmas.device, dtype=torch.float64) / num_steps
    targets = fractions * length[..., -1:]  # [..., num_steps + 1]
    interval = (torch.searchsorted(length, targets.contiguous(), right=True) - 1).clamp(0, widths.shape[-1] - 1)
    width, start, stop = widths.gather(-1, interval), sigmas.gather(-1, interval), sigmas.gather(-1, interval + 1)
    rise = stop - start
    t = ((targets - length.gather(-1, interval)) / width).clamp(0, 1)
    if interpolation == "linear":
        levels = start + t * rise
    else:
        slopes = _pchip_slopes(widths, sigmas.diff(dim=-1) / widths)
        slope0, slope1 = slopes.gather(-1, interval) * width, slopes.gather(-1, interval + 1) * width
        levels = start + t * (slope0 + t * (3 * rise - 2 * slope0 - slope1 + t * (slope0 + slope1 - 2 * rise)))
    # Rounding must not carry a level past its neighbours in the next interval.
    levels = torch.minimum(torch.maximum(levels, torch.minimum(start, stop)), torch.maximum(start, stop))
    levels = torch.cat((sigmas[..., :1], levels[..., 1:-1], sigmas[..., -1:]), -1)
    return torch.where(_valid(sigmas, costs), levels, torch.full_like(levels, torch.nan)).to(dtype)
