"""Group normalisation with scale, shift and SiLU on GPU, in any order of the elements.

A group that fits into registers takes one launch, which reads x once. A larger one is spread over programs: the first pass leaves the
count, mean and squared deviations of its parts, which every program of the second pass puts together in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import capability, compute_dtype, launch
from ._group_norm_backward import gradients, terms_at_once, vector_strides
from ._group_norm_tiles import (
    activate,
    addresses,
    channels_of,
    layout_of,
    locate,
    most_registers,
    of_channels,
    over_groups,
    read,
    read_affine,
    tiles_for,
)


@triton.jit
def _moments(x, mask, count, own):
    """Mean and squared deviations of the groups in a tile, and the deviations from the mean.

    The mean comes as a sum of two numbers, since the distances between the means of parts may be far below the rounding of a large mean.
    """
    mean = over_groups(tl.sum(x, 1), own) / count
    centred = tl.where(mask, x - of_channels(mean, own)[:, None], 0.0)
    rest = over_groups(tl.sum(centred, 1), own) / count
    centred = tl.where(mask, centred - of_channels(rest, own)[:, None], 0.0)
    return mean, rest, over_groups(tl.sum(centred * centred, 1), own), centred


@triton.jit
def _put_statistics(mean_out, inverse_out, mean, inverse_deviation, b, g, here, groups):
    at = b * groups + g
    tl.store(mean_out + at, mean, mask=here & (g < groups))
    tl.store(inverse_out + at, inverse_deviation, mask=here & (g < groups))


@triton.jit
def _whole_kernel(
    x, weight, bias, scale, shift, y, mean_out, inverse_out,
    vector_strides, strides, channels, positions, groups, channel_blocks,
    EPS: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b, block, _ = locate(tl.program_id(0), channel_blocks, 1, True)
    c, present, g, here, own = channels_of(block, channels, 1, WIDTH, COUNT, CHANNELS)
    at, mask = addresses(b, c, 0, channels, positions, strides, present, POSITIONS)
    gain, offset = read_affine(weight, bias, scale, shift, vector_strides, b, c, present)
    elements = WIDTH * positions * 1.0
    mean, rest, squares, centred = _moments(read(x, at, mask), mask, elements, own)
    inverse_deviation = tl.rsqrt(squares / elements + EPS)
    _put_statistics(mean_out, inverse_out, mean + rest, inverse_deviation, b, g, here, groups)
    z = centred * (of_channels(inverse_deviation, own) * gain)[:, None] + offset[:, None]
    tl.store(y + at, activate(z, SILU), mask=mask)


@triton.jit
def _moments_kernel(
    x, partial, strides, channels, positions, groups, channel_blocks, parts, runs, run,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b, block, chunk = locate(tl.program_id(0), channel_blocks, runs, ROWS)
    c, present, g, here, own = channels_of(block, channels, parts, WIDTH, COUNT, CHANNELS)
    width = tl.sum(own.to(tl.int32), 1)
    first = chunk * run * POSITIONS
    stop = tl.minimum(first + run * POSITIONS, positions)
    zero = tl.zeros_like(width).to(partial.dtype.element_ty)
    count, mean, rest, squares = zero, zero, zero, zero
    for start in range(first, stop, POSITIONS):
        at, mask = addresses(b, c, start, channels, positions, strides, present, POSITIONS)
        more = (width * tl.minimum(POSITIONS, positions - start)).to(partial.dtype.element_ty)
        further_mean, further_rest, further_squares, _ = _moments(read(x, at, mask), mask, more, own)
        # Chan, Golub and LeVeque, 1983.
        count += more
        share = more / count
        step, step_rest = further_mean - mean, further_rest - rest
        squares += further_squares + (step + step_rest) * (step + step_rest) * (share * (count - more))
        total = mean + step * share
        rest += ((mean - total) + step * share) + step_rest * share
        mean = total
    terms = parts * runs
    to = partial + (b * groups + g) * terms + block % parts * runs + chunk
    plane = (tl.num_programs(0) // (channel_blocks * runs)).to(tl.int64) * groups * terms
    mask = here & (g < groups)
    tl.store(to, count, mask=mask)
    tl.store(to + plane, mean, mask=mask)
    tl.store(to + 2 * plane, rest, mask=mask)
    tl.store(to + 3 * plane, squares, mask=mask)


@triton.jit
def _put_together(partial, plane, b, g, here, groups, terms, EPS: tl.constexpr, TERMS: tl.constexpr):
    """Mean and inverse deviation of groups from the moments of their parts."""
    row = partial + ((b * groups + g) * terms)[:, None]
    there = (here & (g < groups))[:, None]
    pivot = tl.load(row + plane, mask=there, other=0.0)
    weight = tl.zeros([g.shape[0], TERMS], partial.dtype.element_ty)
    total = weight
    for first in range(0, terms, TERMS):
        i = (first + tl.arange(0, TERMS))[None, :]
        mask = there & (i < terms)
        count = tl.load(row + i, mask=mask, other=0.0)
        weight += count
        total += count * _distance(row + plane + i, plane, pivot, mask)
    count = tl.sum(weight, 1)
    rest = tl.sum(total, 1) / count
    squares = tl.zeros([g.shape[0], TERMS], partial.dtype.element_ty)
    for first in range(0, terms, TERMS):
        i = (first + tl.arange(0, TERMS))[None, :]
        mask = there & (i < terms)
        step = _distance(row + plane + i, plane, pivot, mask) - rest[:, None]
        squares += tl.load(row + 3 * plane + i, mask=mask, other=0.0) + step * step * tl.load(row + i, mask=mask, other=0.0)
    return tl.sum(pivot, 1) + rest, tl.rsqrt(tl.sum(squares, 1) / count + EPS)


@triton.jit
def _distance(mean, plane, pivot, mask):
    """A part's mean less pivot."""
    return (tl.load(mean, mask=mask, other=0.0) - pivot) + tl.load(mean + plane, mask=mask, other=0.0)


@triton.jit
def _normalise_kernel(
    x, weight, bias, scale, shift, partial, y, mean_out, inverse_out,
    vector_strides, strides, channels, positions, groups, channel_blocks, position_blocks, parts, terms,
    EPS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    # From the last tile to the first: what the first pass read last is what a cache still has.
    b, block, tile = locate(tl.num_programs(0) - 1 - tl.program_id(0), channel_blocks, position_blocks, ROWS)
    c, present, g, here, own = channels_of(block, channels, parts, WIDTH, COUNT, CHANNELS)
    at, mask = addresses(b, c, tile * POSITIONS, channels, positions, strides, present, POSITIONS)
    elements = read(x, at, mask)
    gain, offset = read_affine(weight, bias, scale, shift, vector_strides, b, c, present)
    plane = (tl.num_programs(0) // (channel_blocks * position_blocks)).to(tl.int64) * groups * terms
    mean, inverse_deviation = _put_together(partial, plane, b, g, here, groups, terms, EPS, TERMS)
    if (block % parts == 0) & (tile == 0):
        _put_statistics(mean_out, inverse_out, mean, inverse_deviation, b, g, here, groups)
    z = (elements - of_channels(mean, own)[:, None]) * (of_channels(inverse_deviation, own) * gain)[:, None] + offset[:, None]
    tl.store(y + at, activate(z, SILU), mask=mask)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = layout_of(x, num_groups)
    batch = x.shape[0]
    x = x.contiguous(memory_format=layout.format)
    y = torch.empty_like(x, memory_format=layout.format)
    mean, inverse_deviation = (x.new_empty((batch, num_groups), dtype=compute_dtype(x)) for _ in range(2))
    if x.numel() == 0:
        return y, mean.zero_(), inverse_deviation.fill_(eps**-0.5)
    tiles = tiles_for(layout, x, 1, capability(x))
    vectors = (weight, bias, scale, shift)
    strides = (layout.channel_stride, layout.position_stride)
    extent = (layout.channels, layout.positions, num_groups, tiles.channel_blocks)
    constants: dict[str, Any] = {
        "WIDTH": layout.width, "COUNT": tiles.group_count, "CHANNELS": tiles.channels, "POSITIONS": tiles.positions,
        "num_warps": tiles.warps, "maxnreg": most_registers(tiles, layout, x.dtype),
    }  # fmt: skip
    written = (y, mean, inverse_deviation, vector_strides(*vectors), strides, *extent)
    silu = activation is not None
    if tiles.whole:
        launch(_whole_kernel, batch * tiles.channel_blocks, x, *vectors, *written, EPS=eps, SILU=silu, **constants)
        return y, mean, inverse_deviation
    rows, terms = layout.channel_stride == 1, tiles.parts * tiles.runs
    partial = x.new_empty((4, batch, num_groups, terms), dtype=compute_dtype(x))
    launch(
        _moments_kernel, batch * tiles.channel_blocks * tiles.runs, x, partial, strides, *extent, tiles.parts, tiles.runs, tiles.run,
        ROWS=rows, **constants,
    )  # fmt: skip
    launch(
        _normalise_kernel, batch * tiles.per_sample, x, *vectors, partial, *written, tiles.position_blocks, tiles.parts, terms,
        EPS=eps, SILU=silu, ROWS=rows, TERMS=terms_at_once(tiles), **constants,
    )  # fmt: skip
    return y, mean, inverse_deviation


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    eps: float, activation: str | None, mean: Tensor, inverse_deviation: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    return gradients(grad, x, num_groups, weight, bias, scale, shift, activation, mean, inverse_deviation, needs)
