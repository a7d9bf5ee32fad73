"""Third-order criteria of AdaptiveDiffusion in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.skipping import STATE_WIDTH
from ._common import launch, registers_for, widen
from ._samples import WARPS
from ._sums import BLOCK, BLOCKS_PER_CHUNK, CHUNK, locate, sum_samples


@triton.jit
def _skip_kernel(d0, d1, d2, threshold, out, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    oldest = widen(tl.load(d0 + index, mask=mask, other=0.0))
    middle = widen(tl.load(d1 + index, mask=mask, other=0.0))
    newest = widen(tl.load(d2 + index, mask=mask, other=0.0))
    skip = tl.abs((oldest + newest) * 0.5 - middle) <= tl.load(threshold) * middle
    tl.store(out + index, skip.to(tl.int8), mask=mask)


def third_order_skip(d0: Tensor, d1: Tensor, d2: Tensor, threshold: Tensor) -> Tensor:
    """See fastdiff_kernels.ops.third_order_skip."""
    out = torch.empty(d0.shape, dtype=torch.bool, device=d0.device)
    count, block = d0.numel(), 1024
    flat = (d0.contiguous(), d1.contiguous(), d2.contiguous(), threshold, out.view(torch.int8))
    launch(_skip_kernel, triton.cdiv(count, block), *flat, count, BLOCK=block)
    return out


@triton.jit
def _difference_kernel(
    x0, x1, x2, x3, third, last, elements, chunks, divisor, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype = tl.float64 if x0.dtype.element_ty == tl.float64 else tl.float32
    third_sum = tl.zeros((BLOCK,), dtype)
    last_sum = tl.zeros((BLOCK,), dtype)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        oldest = widen(tl.load(x0 + at, mask=mask, other=0.0))
        older = widen(tl.load(x1 + at, mask=mask, other=0.0))
        old = widen(tl.load(x2 + at, mask=mask, other=0.0))
        newest = widen(tl.load(x3 + at, mask=mask, other=0.0))
        third_sum += tl.abs((newest - oldest) - 3.0 * (old - older))
        last_sum += tl.abs(newest - old)
    tl.store(third + tl.program_id(0), tl.sum(third_sum).to(tl.float64) / divisor)
    tl.store(last + tl.program_id(0), tl.sum(last_sum).to(tl.float64) / divisor)


def third_order_difference(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor) -> tuple[Tensor, Tensor]:
    """See fastdiff_kernels.ops.third_order_difference."""
    latents = tuple(x.contiguous() for x in (x0, x1, x2, x3))
    if x0.numel() == 0:
        means = x0.new_full(x0.shape[:1], torch.nan, dtype=torch.float64 if x0.dtype == torch.float64 else torch.float32)
        return means, means.clone()
    third, last = sum_samples(_difference_kernel, latents, 2, divisor=x0.numel() // x0.shape[0], num_warps=WARPS, **registers_for(x0))
    return third, last


@triton.jit
def _continuation(own_state, at):
    """How far beyond the older of two predictions `at` lies, in units of their distance; whether there are two."""
    both = tl.load(own_state + 3) >= 2.0
    newest_at = tl.load(own_state + 4)
    older_at = tl.load(own_state + 5)
    return tl.where(both, (at - older_at) / tl.where(both, newest_at - older_at, 1.0), 0.0).to(tl.float32), both


@triton.jit
def _step_kernel(
    x, denoised, uncond, rows, newest, older, previous, point, before1, before0, state, following, noise, used, third, last,
    elements, chunks, state_stride, sigma, guidance, replaced, kept, weight, second, divisor, reuse_at,
    scale_next, scale_change, scale, scale1, scale0,
    FROM_X: tl.constexpr, DECIDES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of one sample. An argument that is None takes what reads it out of the kernel."""
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    row = sample
    computed_end = elements
    reused_end = elements
    if rows is not None:
        row = tl.load(rows + sample)
        computed_end = tl.where(row >= 0, elements, 0)
        reused_end = tl.where(row >= 0, 0, elements)
    if older is not None:
        ahead, both = _continuation(state + sample * state_stride, reuse_at)
    third_sum = tl.zeros((BLOCK,), tl.float32)
    last_sum = tl.zeros((BLOCK,), tl.float32)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        here = widen(tl.load(x + at, mask=mask, other=0.0))
        if denoised is not None:
            wanted = index < computed_end
            guided = widen(tl.load(denoised + row * elements + index, mask=wanted, other=0.0))
            if uncond is not None:
                without = widen(tl.load(uncond + row * elements + index, mask=wanted, other=0.0))
                guided = without + guidance * (guided - without)
            if point is not None:
                middle = widen(tl.load(point + at, mask=wanted, other=0.0))
                error = middle - guided
            else:
                error = here - guided
        if newest is not None:
            wanted = index < reused_end
            held = widen(tl.load(newest + at, mask=wanted, other=0.0))
            predicted = held
            if older is not None:
                past = widen(tl.load(older + at, mask=wanted, other=0.0))
                predicted = tl.where(both, past + ahead * (held - past), held)
            if rows is not None:
                error = tl.where(row >= 0, error, sigma * predicted)
                guided = tl.where(row >= 0, guided, here - error)
            else:
                error = sigma * predicted
                guided = here - error
        if noise is not None:
            fresh = error / divisor
            if rows is not None:
                fresh = tl.where(row >= 0, fresh, held)
            tl.store(noise + at, fresh, mask=mask)
        if used is not None:
            tl.store(used + at, guided, mask=mask)
        if previous is not None:
            extra = weight * (guided - widen(tl.load(previous + at, mask=mask, other=0.0)))
            guided += extra
            # The old error is still wanted below where `point` is: never together with this.
            error -= extra
        move = -replaced * error
        result = here + move if FROM_X else guided + kept * error
        if point is not None:
            half = 0.5 * (middle - here) + second * error
            if rows is not None:
                move = tl.where(row >= 0, half, move)
                result = tl.where(row >= 0, here + half, result)
            else:
                move = half
                result = here + half
        tl.store(following + at, result, mask=mask)
        if DECIDES:
            change = scale_next * move + scale_change * here
            last_sum += tl.where(mask, tl.abs(change), 0.0)
            if before0 is not None:  # and so before1
                older_value = scale1 * widen(tl.load(before1 + at, mask=mask, other=0.0))
                oldest_value = scale0 * widen(tl.load(before0 + at, mask=mask, other=0.0))
                difference = change - 2.0 * (scale * here - older_value) + (older_value - oldest_value)
                third_sum += tl.where(mask, tl.abs(difference), 0.0)
    if DECIDES:
        tl.store(third + tl.program_id(0), tl.sum(third_sum).to(tl.float64))
        tl.store(last + tl.program_id(0), tl.sum(last_sum).to(tl.float64))


@triton.jit
def _decide_kernel(
    third, last, rows, state, after, parts, count, at, threshold, max_skip,
    NOTES: tl.constexpr, MODE: tl.constexpr, HAS_THIRD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of the state from the sums of its `parts` chunks, in an order that depends on their number alone."""
    decision = tl.program_id(0).to(tl.int64)
    own = state + decision * 9
    out = after + decision * 9
    steps = tl.load(own)
    run = tl.load(own + 1)
    reuse = tl.load(own + 2)
    stored = tl.load(own + 3)
    newest_at = tl.load(own + 4)
    older_at = tl.load(own + 5)
    d0 = tl.load(own + 6)
    d1 = tl.load(own + 7)
    d2 = tl.load(own + 8)
    if NOTES:
        fresh = steps >= 0.0
        if rows is not None:
            fresh = tl.load(rows + decision) >= 0
        older_at = tl.where(fresh, newest_at, older_at)
        newest_at = tl.where(fresh, at, newest_at)
        stored = tl.where(fresh, tl.minimum(stored + 1.0, 2.0), stored)
    if MODE != "none":
        third_total = tl.zeros((WIDTH,), tl.float64)
        last_total = tl.zeros((WIDTH,), tl.float64)
        for first in range(0, parts, WIDTH):
            index = first + tl.arange(0, WIDTH)
            part = decision * parts + index
            last_total += tl.load(last + part, mask=index < parts, other=0.0)
            if HAS_THIRD:
                third_total += tl.load(third + part, mask=index < parts, other=0.0)
        mean = tl.sum(last_total, 0) / count
        steps += 1.0
        d0 = d1
        d1 = d2
        d2 = mean
        if MODE == "official":
            entries = steps - 4.0
            straight = (entries >= 0.0) & (tl.abs((d0 + d2) * 0.5 - d1) <= threshold * d1)
            again = straight & ((entries <= 4.0) | (run < tl.minimum(entries, max_skip)))
        elif HAS_THIRD:
            again = (tl.sum(third_total, 0) / count <= threshold * mean) & (run < max_skip)
        else:
            again = steps < 0.0
        reuse = tl.where(again, 1.0, 0.0)
        run = tl.where(again, run + 1.0, 0.0)
    tl.store(out, steps)
    tl.store(out + 1, run)
    tl.store(out + 2, reuse)
    tl.store(out + 3, stored)
    tl.store(out + 4, newest_at)
    tl.store(out + 5, older_at)
    tl.store(out + 6, d0)
    tl.store(out + 7, d1)
    tl.store(out + 8, d2)


def solver_step(
    x: Tensor, denoised: Tensor | None, uncond: Tensor | None, rows: Tensor | None, newest: Tensor | None, older: Tensor | None,
    previous: Tensor | None, point: Tensor | None, before1: Tensor | None, before0: Tensor | None, state: Tensor | None,
    sigma: float, sigma_next: float, guidance: float, at: float, reuse_at: float, previous_weight: float, scale_next: float,
    scale: float, scale1: float, scale0: float, mode: str, threshold: float, max_skip: int, keep_noise: bool, keep_denoised: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See fastdiff_kernels.ops.solver_step. One launch for the step, one for the decision."""
    batch = x.shape[0]
    elements = x.numel() // batch if batch else 0
    chunks = max(1, triton.cdiv(elements, CHUNK))
    decides = mode != "none"
    per_sample = state is not None and state.shape[0] == batch
    following = x.new_empty(x.shape)
    noise, used = (x.new_empty(x.shape) if wanted else None for wanted in (keep_noise, keep_denoised))
    third, last = (x.new_empty(batch * chunks if decides else 0, dtype=torch.float64) for _ in range(2))
    after = x.new_empty(0 if state is None else state.shape, dtype=torch.float64)
    # A line needs the times of its two points, and a step that computes every sample nothing of what is remembered.
    if state is None:
        older = None
    if denoised is not None and rows is None:
        newest = older = None
    given = (x, denoised, uncond, rows, newest, older, previous, point, before1, before0, state)
    dense = tuple(None if t is None else t.contiguous() for t in given)
    kept = sigma_next / sigma
    second = 0.0 if point is None else 0.5 * (sigma_next - sigma) / sigma_next
    divisor = sigma if point is None else sigma_next
    scalars = (sigma, guidance, (sigma - sigma_next) / sigma, kept, previous_weight, second, divisor, reuse_at)
    numbers = (float(s) for s in (*scalars, scale_next, scale_next - scale, scale, scale1, scale0))
    sizes = (elements, chunks, STATE_WIDTH if per_sample else 0)
    launch(
        _step_kernel, batch * chunks, *dense, following, noise, used, third, last, *sizes, *numbers,
        FROM_X=kept > 0.5, DECIDES=decides, BLOCK=BLOCK, BLOCKS_PER_CHUNK=BLOCKS_PER_CHUNK, num_warps=WARPS, maxnreg=128,
    )  # fmt: skip
    if state is not None:
        pooled = 1 if per_sample else batch
        # One decision about no samples has no row to look at.
        computed = dense[3] if batch else None
        launch(
            _decide_kernel, state.shape[0], third, last, computed, dense[-1], after, pooled * chunks, pooled * elements, float(at),
            float(threshold), max_skip, NOTES=keep_noise, MODE=mode, HAS_THIRD=mode == "tensor" and before0 is not None, WIDTH=256,
        )  # fmt: skip
    return following, x.new_empty(0) if noise is None else noise, x.new_empty(0) if used is None else used, after
