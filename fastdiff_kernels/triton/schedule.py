"""Costs of intervals between noise levels, and levels that share them evenly, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import launch, widen
from ._sums import locate, sum_samples


@triton.jit
def _cost_kernel(
    x, raw_low, raw_high, cost, elements, chunks, divisor, sigma_low, sigma_high, low_stride, high_stride,
    SIGMA_DATA: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    low = tl.load(sigma_low + sample * low_stride)
    high = tl.load(sigma_high + sample * high_stride)
    # In float64, since the two levels of a fine grid nearly cancel.
    variance_low = low * low + SIGMA_DATA * SIGMA_DATA
    variance_high = high * high + SIGMA_DATA * SIGMA_DATA
    raw_factor = SIGMA_DATA / tl.sqrt(variance_low)
    high_factor = (raw_factor - low / high * (SIGMA_DATA / tl.sqrt(variance_high))).to(dtype)
    x_factor = (low * (high - low) * (high + low) / (variance_low * variance_high)).to(dtype)
    raw_factor = raw_factor.to(dtype)
    total = tl.zeros((BLOCK,), dtype)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        noisy = widen(tl.load(x + at, mask=mask, other=0.0))
        of_low = widen(tl.load(raw_low + at, mask=mask, other=0.0))
        of_high = widen(tl.load(raw_high + at, mask=mask, other=0.0))
        difference = raw_factor * (of_low - of_high) + (high_factor * of_high - x_factor * noisy)
        total += difference * difference
    tl.store(cost + tl.program_id(0), tl.sum(total).to(tl.float64) / divisor)


def incremental_cost(x: Tensor, raw_low: Tensor, raw_high: Tensor, sigma_low: Tensor, sigma_high: Tensor, sigma_data: float) -> Tensor:
    """See fastdiff_kernels.ops.incremental_cost. Compiled once for every sigma_data, which as an argument would be rounded to float32."""
    inputs = (x.contiguous(), raw_low.contiguous(), raw_high.contiguous())
    strides = tuple(0 if sigma.numel() == 1 else sigma.stride(0) for sigma in (sigma_low, sigma_high))
    # As for `registers_for`, and on capability 100 for bfloat16 too.
    limit = {"maxnreg": 128} if x.dtype.itemsize == 2 else {}
    return sum_samples(_cost_kernel, inputs, 1, sigma_low, sigma_high, *strides, SIGMA_DATA=sigma_data, **limit)[0]


@triton.jit
def _accumulate_kernel(sigmas, costs, lengths, floors, intervals, BLOCK: tl.constexpr):
    """Running sums of sqrt(cost), and the floor of the costs; NaN for that where the schedule is not valid."""
    schedule = tl.program_id(0).to(tl.int64)
    own_sigmas = sigmas + schedule * (intervals + 1)
    own_costs = costs + schedule * intervals
    own_lengths = lengths + schedule * (intervals + 1)
    highest = tl.zeros((BLOCK,), tl.float64)
    rising = tl.zeros((BLOCK,), tl.int32)
    falling = tl.zeros((BLOCK,), tl.int32)
    unusable = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, intervals, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < intervals
        cost = tl.load(own_costs + index, mask=mask, other=0.0).to(tl.float64)
        left = tl.load(own_sigmas + index, mask=mask, other=0.0)
        right = tl.load(own_sigmas + index + 1, mask=mask, other=0.0)
        highest = tl.where(cost > highest, cost, highest)
        rising += (right > left).to(tl.int32)
        falling += (right < left).to(tl.int32)
        unusable += ((cost >= 0) & (cost < float("inf"))).to(tl.int32) ^ 1
    largest = tl.max(highest, 0)
    ends = tl.abs(tl.load(own_sigmas)) + tl.abs(tl.load(own_sigmas + intervals))
    monotone = (tl.sum(rising, 0) == intervals) | (tl.sum(falling, 0) == intervals)
    valid = monotone & (tl.sum(unusable, 0) == 0) & (largest > 0) & (ends < float("inf"))
    floor = tl.maximum(largest * 1e-12, 2.2250738585072014e-308)
    carry = largest * 0.0
    tl.store(own_lengths, carry)
    for first in range(0, intervals, BLOCK):
        index = first + tl.arange(0, BLOCK)
        mask = index < intervals
        cost = tl.load(own_costs + index, mask=mask, other=0.0).to(tl.float64)
        width = tl.where(mask, tl.sqrt(tl.where(cost < floor, floor, cost)), 0.0)
        tl.store(own_lengths + index + 1, carry + tl.cumsum(width, 0), mask=mask)
        carry += tl.sum(width, 0)
    tl.store(floors + schedule, tl.where(valid, floor, float("nan")))


@triton.jit
def _width(costs, floor, index, mask):
    cost = tl.load(costs + index, mask=mask, other=1.0).to(tl.float64)
    return tl.sqrt(tl.where(cost < floor, floor, cost))


@triton.jit
def _rise(sigmas, index, mask):
    right = tl.load(sigmas + index + 1, mask=mask, other=1.0).to(tl.float64)
    return right - tl.load(sigmas + index, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _end_slope(width, next_width, secant, next_secant):
    slope = ((2.0 * width + next_width) * secant - width * next_secant) / (width + next_width)
    return tl.where(slope * secant > 0, slope, 0.0)


@triton.jit
def _knot_slope(sigmas, costs, floor, intervals, knot, mask):
    """Slopes of the monotone cubic at some knots: a weighted harmonic mean of the secants, one-sided at the ends."""
    # At an end, the interval there and the one next to it; with a single interval both are that one, and the slope its secant.
    left = tl.minimum(tl.maximum(knot - 1, 0), tl.maximum(intervals - 2, 0))
    right = tl.minimum(left + 1, intervals - 1)
    width_left = _width(costs, floor, left, mask)
    width_right = _width(costs, floor, right, mask)
    secant_left = _rise(sigmas, left, mask) / width_left
    secant_right = _rise(sigmas, right, mask) / width_right
    weight_left = width_left + 2.0 * width_right
    weight_right = 2.0 * width_left + width_right
    inner = (weight_left + weight_right) / (weight_left / secant_left + weight_right / secant_right)
    first = _end_slope(width_left, width_right, secant_left, secant_right)
    last = _end_slope(width_right, width_left, secant_right, secant_left)
    return tl.where(knot == 0, first, tl.where(knot == intervals, last, inner))


@triton.jit
def _level_kernel(
    sigmas, costs, lengths, floors, levels, intervals, steps, blocks, rounds, CUBIC: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    schedule = program // blocks
    own_sigmas = sigmas + schedule * (intervals + 1)
    own_costs = costs + schedule * intervals
    own_lengths = lengths + schedule * (intervals + 1)
    floor = tl.load(floors + schedule)
    step = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = step <= steps
    target = step.to(tl.float64) / steps * tl.load(own_lengths + intervals)
    interval = step * 0
    above = interval + intervals
    for _ in range(rounds):
        middle = (interval + above) // 2
        reached = tl.load(own_lengths + middle, mask=mask, other=0.0) <= target
        interval = tl.where(reached, middle, interval)
        above = tl.where(reached, above, middle)
    interval = tl.minimum(interval, intervals - 1)
    start = tl.load(own_sigmas + interval, mask=mask, other=0.0).to(tl.float64)
    end = tl.load(own_sigmas + interval + 1, mask=mask, other=1.0).to(tl.float64)
    rise = end - start
    width = _width(own_costs, floor, interval, mask)
    t = (target - tl.load(own_lengths + interval, mask=mask, other=0.0)) / width
    t = tl.minimum(tl.maximum(t, 0.0), 1.0)
    if CUBIC:
        slope0 = _knot_slope(own_sigmas, own_costs, floor, intervals, interval, mask) * width
        slope1 = _knot_slope(own_sigmas, own_costs, floor, intervals, interval + 1, mask) * width
        level = start + t * (slope0 + t * (3.0 * rise - 2.0 * slope0 - slope1 + t * (slope0 + slope1 - 2.0 * rise)))
    else:
        level = start + t * rise
    # Rounding must not carry a level past its neighbours in the next interval.
    level = tl.minimum(tl.maximum(level, tl.minimum(start, end)), tl.maximum(start, end))
    level = tl.where(step == 0, tl.load(own_sigmas).to(tl.float64), level)
    level = tl.where(step == steps, tl.load(own_sigmas + intervals).to(tl.float64), level)
    tl.store(levels + schedule * (steps + 1) + step, tl.where(floor == floor, level, float("nan")), mask=mask)


def integrate_schedule(sigmas: Tensor, costs: Tensor, num_steps: int, interpolation: str) -> Tensor:
    """See fastdiff_kernels.ops.integrate_schedule."""
    sigmas, costs = sigmas.contiguous(), costs.contiguous()
    intervals = costs.shape[-1]
    batch = costs.numel() // intervals
    levels = sigmas.new_empty((*sigmas.shape[:-1], num_steps + 1))
    lengths = sigmas.new_empty((batch, intervals + 1), dtype=torch.float64)
    floors = sigmas.new_empty(batch, dtype=torch.float64)
    # One program a schedule may have the registers that ptxas would spill for another's sake.
    launch(_accumulate_kernel, batch, sigmas, costs, lengths, floors, intervals, BLOCK=1024, maxnreg=128)
    block = 128
    blocks, rounds = triton.cdiv(num_steps + 1, block), intervals.bit_length()
    arguments = (sigmas, costs, lengths, floors, levels, intervals, num_steps, blocks, rounds)
    launch(_level_kernel, batch * blocks, *arguments, CUBIC=interpolation == "pchip", BLOCK=block)
    return levels
