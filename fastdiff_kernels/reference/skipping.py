"""Definitions: the third-order difference criteria by which AdaptiveDiffusion skips network calls, and the solver step that ends in one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import compute_dtype, mean_per_sample

# Columns of the state of a trajectory.
STEPS, RUN, REUSE, STORED, NEWEST_AT, OLDER_AT, D0, D1, D2 = range(9)
STATE_WIDTH = 9
WARM_UP_STEPS = 4
CAP_FREE_ENTRIES = 4  # The authors' cap looks at their list of decisions only once it is longer than this.


def third_order_skip(d0: Tensor, d1: Tensor, d2: Tensor, threshold: float | Tensor) -> Tensor:
    """|(d0 + d2) / 2 - d1| <= threshold * d1, elementwise; d2 the newest."""
    dtype = compute_dtype(d0)
    d0, d1, d2 = (d.to(dtype) for d in (d0, d1, d2))
    # Of shape [1] it would give a result for 0-d changes a dimension.
    bound = threshold.reshape(()).to(dtype) if isinstance(threshold, Tensor) else threshold
    return ((d0 + d2) / 2 - d1).abs() <= bound * d1


def third_order_difference(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor) -> tuple[Tensor, Tensor]:
    """Means over each sample of |x3 - 3 x2 + 3 x1 - x0| and of |x3 - x2|."""
    dtype = compute_dtype(x0)
    x0, x1, x2, x3 = (x.to(dtype) for x in (x0, x1, x2, x3))
    return mean_per_sample((x3 - x0 - 3 * (x2 - x1)).abs()), mean_per_sample((x3 - x2).abs())


def solver_step(
    x: Tensor,
    denoised: Tensor | None,
    uncond: Tensor | None,
    rows: Tensor | None,
    newest: Tensor | None,
    older: Tensor | None,
    previous: Tensor | None,
    point: Tensor | None,
    before1: Tensor | None,
    before0: Tensor | None,
    state: Tensor | None,
    sigma: float,
    sigma_next: float,
    guidance: float,
    at: float,
    reuse_at: float,
    previous_weight: float,
    scale_next: float,
    scale: float,
    scale1: float,
    scale0: float,
    mode: str,
    threshold: float,
    max_skip: int,
    keep_noise: bool,
    keep_denoised: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_next, noise, D, state): one step of a solver from a computed or a reused prediction, and the decision about the next one.

    Samples with rows[b] < 0 reuse, the others compute; without rows all compute where `denoised` is given and all reuse where not.
    """
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    computed = _computed(x, denoised, rows)  # [B]
    chosen = computed.reshape(-1, *[1] * (x.dim() - 1))
    guided = error = wide
    if denoised is not None:
        guided = _guided(denoised.to(dtype), uncond, guidance)
        guided = guided if rows is None else guided[rows.clamp(min=0)]
        error = (wide if point is None else point.to(dtype)) - guided
    if newest is not None:
        reused = sigma * _continued(newest.to(dtype), older, state, reuse_at)
        error, guided = torch.where(chosen, error, reused), torch.where(chosen, guided, wide - reused)
    following, move = _advance(wide, guided, error, previous, sigma, sigma_next, previous_weight)
    if point is not None:
        second = 0.5 * (point.to(dtype) - wide) + (0.5 * (sigma_next - sigma) / sigma_next) * error
        following, move = torch.where(chosen, wide + second, following), torch.where(chosen, second, move)
    noise = x.new_empty(0)
    if keep_noise:
        noise = error / (sigma if point is None else sigma_next)
        noise = (noise if newest is None else torch.where(chosen, noise, newest.to(dtype))).to(x.dtype)
    used = guided.to(x.dtype) if keep_denoised else x.new_empty(0)
    means = _means(wide, move, before1, before0, (scale_next, scale, scale1, scale0), mode)
    return following.to(x.dtype), noise, used, _next_state(x, state, computed, means, at, mode, threshold, max_skip, keep_noise)


def _computed(x: Tensor, denoised: Tensor | None, rows: Tensor | None) -> Tensor:
    if rows is not None:
        return rows >= 0
    return torch.full(x.shape[:1], denoised is not None, dtype=torch.bool, device=x.device)


def _guided(denoised: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    if uncond is None:
        return denoised
    uncond = uncond.to(denoised.dtype)
    return uncond + guidance * (denoised - uncond)


def _continued(newest: Tensor, older: Tensor | None, state: Tensor | None, at: float) -> Tensor:
    """The noise prediction at `at`: on the line through the last two, or the last one where there are not two."""
    if older is None or state is None:
        return newest
    older = older.to(newest.dtype)
    # In float64: the two are close where steps are many.
    factor = (at - state[:, OLDER_AT]) / (state[:, NEWEST_AT] - state[:, OLDER_AT])  # [R]
    factor, both = (value.reshape(-1, *[1] * (newest.dim() - 1)) for value in (factor.to(newest.dtype), state[:, STORED] >= 2))
    return torch.where(both, older + factor * (newest - older), newest)


def _advance(
    x: Tensor, denoised: Tensor, error: Tensor, previous: Tensor | None, sigma: float, sigma_next: float, weight: float
) -> tuple[Tensor, Tensor]:
    kept, replaced = sigma_next / sigma, (sigma - sigma_next) / sigma
    if previous is not None:
        extra = weight * (denoised - previous.to(x.dtype))
        denoised, error = denoised + extra, error - extra
    move = -replaced * error
    # From the nearer end, so that a step to sigma_next = 0 is exactly D, and a short one loses nothing of x.
    return x + move if kept > 0.5 else denoised + kept * error, move


def _means(
    x: Tensor, move: Tensor, before1: Tensor | None, before0: Tensor | None, scales: Sequence[float], mode: str
) -> tuple[Tensor, Tensor]:
    """Means over each sample of the third difference and of the last change, [B] each; NaN for what is not asked for or not known yet."""
    unknown = x.new_full(x.shape[:1], math.nan)
    if mode == "none":
        return unknown, unknown
    change = scales[0] * move + (scales[0] - scales[1]) * x
    last = mean_per_sample(change.abs())
    if mode == "official" or before1 is None or before0 is None:
        return unknown, last
    older = scales[2] * before1.to(x.dtype)
    third = change - 2 * (scales[1] * x - older) + (older - scales[3] * before0.to(x.dtype))
    return mean_per_sample(third.abs()), last


def _next_state(
    x: Tensor,
    state: Tensor | None,
    computed: Tensor,
    means: tuple[Tensor, Tensor],
    at: float,
    mode: str,
    threshold: float,
    max_skip: int,
    stored: bool,
) -> Tensor:
    if state is None:
        return x.new_empty(0, dtype=torch.float64)
    pooled = state.shape[0] != x.shape[0]
    columns = list(state.unbind(1))
    if stored:
        fresh = computed[:1].expand(state.shape[0]) if pooled else computed
        columns[OLDER_AT] = torch.where(fresh, columns[NEWEST_AT], columns[OLDER_AT])
        columns[NEWEST_AT] = torch.where(fresh, torch.full_like(columns[NEWEST_AT], at), columns[NEWEST_AT])
        columns[STORED] = torch.where(fresh, (columns[STORED] + 1).clamp(max=2), columns[STORED])
    if mode != "none":
        third, last = (mean.double().mean().reshape(1) if pooled else mean.double() for mean in means)
        columns[STEPS] = columns[STEPS] + 1
        columns[D0], columns[D1], columns[D2] = columns[D1], columns[D2], last
        if mode == "official":
            entries = columns[STEPS] - WARM_UP_STEPS
            straight = third_order_skip(columns[D0], columns[D1], columns[D2], threshold) & (entries >= 0)
            reuse = straight & ((entries <= CAP_FREE_ENTRIES) | (columns[RUN] < entries.clamp(max=max_skip)))
        else:
            reuse = (third <= threshold * last) & (columns[RUN] < max_skip)
        columns[REUSE] = reuse.double()
        columns[RUN] = torch.where(reuse, columns[RUN] + 1, torch.zeros_like(columns[RUN]))
    return torch.stack(columns, 1)
