"""Gradients of group normalisation on GPU.

With n = (x - mean) / deviation, z = gain n + offset and dz the gradient of z, everything follows from two sums over each channel of a
sample, of dz and of dz n. A group that fits into registers takes one launch; of a larger one the first pass leaves sums of its parts, of
channels and of the whole group, and the second adds them in their order. What weight and bias receive is then added over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _group_norm_tiles
from ._common import absent, capability, compute_dtype, launch
from ._group_norm_tiles import (
    Tiles,
    activate_gradient,
    addresses,
    channels_of,
    layout_of,
    locate,
    most_registers,
    of_channels,
    over_groups,
    read,
    read_affine,
    read_vector,
    tiles_for,
)


@triton.jit
def _read_of_channels(pointer, b, g, here, groups, own):
    """A statistic of groups for each channel."""
    return of_channels(read(pointer, b * groups + g, here & (g < groups)), own)


@triton.jit
def _grad_z(grad, x, at, mask, mean, inverse_deviation, gain, offset, SILU: tl.constexpr):
    """Normalised elements of a tile and the gradient of z there."""
    normal = tl.where(mask, (read(x, at, mask) - mean[:, None]) * inverse_deviation[:, None], 0.0)
    return normal, read(grad, at, mask) * activate_gradient(normal * gain[:, None] + offset[:, None], SILU)


@triton.jit
def _put_parameters(
    grad_scale, grad_shift, of_weight, of_bias, weight, bias, scale, vector_strides, plain, product, b, c, present, channels,
):  # fmt: skip
    """What a sample's sums over a channel give to each parameter."""
    at = b * channels + c
    if grad_shift is not None:
        tl.store(grad_shift + at, plain, mask=present)
    if grad_scale is not None:
        weights = read_vector(weight, b, vector_strides[0], c, present, 1.0)
        biases = read_vector(bias, b, vector_strides[1], c, present, 0.0)
        tl.store(grad_scale + at, weights * product + biases * plain, mask=present)
    factor = 1.0 + read_vector(scale, b, vector_strides[2], c, present, 0.0)
    if of_weight is not None:
        tl.store(of_weight + at, factor * product, mask=present)
    if of_bias is not None:
        tl.store(of_bias + at, factor * plain, mask=present)


@triton.jit
def _whole_kernel(
    grad, x, weight, bias, scale, shift, mean, inverse_deviation, grad_x, grad_scale, grad_shift, of_weight, of_bias,
    vector_strides, strides, channels, positions, groups, channel_blocks,
    SILU: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    b, block, _ = locate(tl.program_id(0), channel_blocks, 1, True)
    c, present, g, here, own = channels_of(block, channels, 1, WIDTH, COUNT, CHANNELS)
    at, mask = addresses(b, c, 0, channels, positions, strides, present, POSITIONS)
    gain, offset = read_affine(weight, bias, scale, shift, vector_strides, b, c, present)
    means = _read_of_channels(mean, b, g, here, groups, own)
    inverse = _read_of_channels(inverse_deviation, b, g, here, groups, own)
    normal, grad_z = _grad_z(grad, x, at, mask, means, inverse, gain, offset, SILU)
    plain, product = tl.sum(grad_z, 1), tl.sum(grad_z * normal, 1)
    _put_parameters(
        grad_scale, grad_shift, of_weight, of_bias, weight, bias, scale, vector_strides, plain, product, b, c, present, channels
    )
    if grad_x is not None:
        elements = WIDTH * positions * 1.0
        constant = of_channels(over_groups(gain * plain, own) / elements, own) * inverse
        slope = of_channels(over_groups(gain * product, own) / elements, own) * inverse
        gradient = grad_z * (gain * inverse)[:, None] - (normal * slope[:, None] + constant[:, None])
        tl.store(grad_x + at, gradient, mask=mask)


@triton.jit
def _sums_kernel(
    grad, x, weight, bias, scale, shift, mean, inverse_deviation, of_groups, of_parts,
    vector_strides, strides, channels, positions, groups, channel_blocks, parts, runs, run,
    SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    b, block, chunk = locate(tl.program_id(0), channel_blocks, runs, ROWS)
    c, present, g, here, own = channels_of(block, channels, parts, WIDTH, COUNT, CHANNELS)
    gain, offset = read_affine(weight, bias, scale, shift, vector_strides, b, c, present)
    means = _read_of_channels(mean, b, g, here, groups, own)
    inverse = _read_of_channels(inverse_deviation, b, g, here, groups, own)
    first = chunk * run * POSITIONS
    plain = tl.zeros([CHANNELS], ACCUMULATOR)
    product = tl.zeros([CHANNELS], ACCUMULATOR)
    for start in range(first, tl.minimum(first + run * POSITIONS, positions), POSITIONS):
        at, mask = addresses(b, c, start, channels, positions, strides, present, POSITIONS)
        normal, grad_z = _grad_z(grad, x, at, mask, means, inverse, gain, offset, SILU)
        plain += tl.sum(grad_z, 1)
        product += tl.sum(grad_z * normal, 1)
    samples = (tl.num_programs(0) // (channel_blocks * runs)).to(tl.int64)
    if of_groups is not None:
        to = of_groups + (b * groups + g) * parts * runs + block % parts * runs + chunk
        tl.store(to, over_groups(gain * plain, own), mask=here & (g < groups))
        tl.store(to + samples * groups * parts * runs, over_groups(gain * product, own), mask=here & (g < groups))
    if of_parts is not None:
        to = of_parts + (b * runs + chunk) * channels + c
        tl.store(to, plain, mask=present)
        tl.store(to + samples * runs * channels, product, mask=present)


@triton.jit
def _added(pointer, rows, stride, columns, mask, DEPTH: tl.constexpr):
    """Sums of `rows` vectors, `stride` apart."""
    total = tl.zeros([DEPTH, columns.shape[0]], pointer.dtype.element_ty)
    for first in range(0, rows, DEPTH):
        r = first + tl.arange(0, DEPTH)
        total += tl.load(pointer + r.to(tl.int64)[:, None] * stride + columns[None, :], mask=(r < rows)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _elements_kernel(
    grad, x, weight, bias, scale, shift, mean, inverse_deviation, of_groups, of_parts,
    grad_x, grad_scale, grad_shift, of_weight, of_bias,
    vector_strides, strides, channels, positions, groups, channel_blocks, position_blocks, parts, runs,
    SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    # From the last tile to the first: what the first pass read last is what a cache still has.
    b, block, tile = locate(tl.num_programs(0) - 1 - tl.program_id(0), channel_blocks, position_blocks, ROWS)
    c, present, g, here, own = channels_of(block, channels, parts, WIDTH, COUNT, CHANNELS)
    samples = (tl.num_programs(0) // (channel_blocks * position_blocks)).to(tl.int64)
    if grad_x is not None:
        at, mask = addresses(b, c, tile * POSITIONS, channels, positions, strides, present, POSITIONS)
        gain, offset = read_affine(weight, bias, scale, shift, vector_strides, b, c, present)
        means = _read_of_channels(mean, b, g, here, groups, own)
        inverse = _read_of_channels(inverse_deviation, b, g, here, groups, own)
        normal, grad_z = _grad_z(grad, x, at, mask, means, inverse, gain, offset, SILU)
        terms = parts * runs
        there = here & (g < groups)
        elements = positions * (WIDTH * 1.0)
        sums = of_groups + (b * groups + g) * terms
        constant = of_channels(_along(sums, terms, there, TERMS) / elements, own) * inverse
        slope = of_channels(_along(sums + samples * groups * terms, terms, there, TERMS) / elements, own) * inverse
        gradient = grad_z * (gain * inverse)[:, None] - (normal * slope[:, None] + constant[:, None])
        tl.store(grad_x + at, gradient, mask=mask)
    if of_parts is not None:  # noqa: SIM102  (known when compiling, unlike what follows)
        if tile == 0:
            row = of_parts + b * runs * channels
            plain = _added(row, runs, channels, c, present, 16)
            product = _added(row + samples * runs * channels, runs, channels, c, present, 16)
            _put_parameters(
                grad_scale, grad_shift, of_weight, of_bias, weight, bias, scale, vector_strides, plain, product, b, c, present, channels
            )


@triton.jit
def _along(rows, terms, there, TERMS: tl.constexpr):
    """Sums of `terms` numbers from each of some addresses on."""
    total = tl.zeros([rows.shape[0], TERMS], rows.dtype.element_ty)
    for first in range(0, terms, TERMS):
        i = first + tl.arange(0, TERMS)
        total += tl.load(rows[:, None] + i[None, :], mask=there[:, None] & (i < terms)[None, :], other=0.0)
    return tl.sum(total, 1)


@triton.jit
def _batch_kernel(of_weight, of_bias, grad_weight, grad_bias, batch, channels, DEPTH: tl.constexpr, CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if grad_weight is not None:
        tl.store(grad_weight + c, _added(of_weight, batch, channels, c, c < channels, DEPTH), mask=c < channels)
    if grad_bias is not None:
        tl.store(grad_bias + c, _added(of_bias, batch, channels, c, c < channels, DEPTH), mask=c < channels)


def vector_strides(*vectors: Tensor | None) -> tuple[tuple[int, int], ...]:
    """Distances between the samples and between the channels of operands [C] or [B, C]."""
    return tuple((0, 0) if v is None else (v.stride(0) if v.dim() > 1 else 0, v.stride(-1)) for v in vectors)


def terms_at_once(tiles: Tiles) -> int:
    """How many partial results of a group a program loads together."""
    return min(triton.next_power_of_2(tiles.parts * tiles.runs), _group_norm_tiles.PARTIAL)


def gradients(
    grad: Tensor, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    activation: str | None, mean: Tensor, inverse_deviation: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of x, weight, bias, scale and shift, those not needed empty."""
    layout = layout_of(x, num_groups)
    batch, channels = x.shape[:2]
    x, grad = x.contiguous(memory_format=layout.format), grad.contiguous(memory_format=layout.format)
    vectors = (weight, bias, scale, shift)
    if x.numel() == 0:
        return tuple(v.new_zeros(v.shape) if need and v is not None else absent(x) for v, need in zip((x, *vectors), needs, strict=True))
    grad_x = torch.empty_like(x, memory_format=layout.format) if needs[0] else None
    wanted = [v if need else None for v, need in zip(vectors, needs[1:], strict=True)]
    grad_weight, grad_bias, grad_scale, grad_shift = (None if v is None else v.new_empty(v.shape) for v in wanted)
    of_weight, of_bias = (None if v is None else x.new_empty((batch, channels), dtype=compute_dtype(x)) for v in (grad_weight, grad_bias))
    tiles = tiles_for(layout, x, 2, capability(x))
    read_in = (grad, x, weight, bias, scale, shift, mean.contiguous(), inverse_deviation.contiguous())
    written = (grad_x, grad_scale, grad_shift, of_weight, of_bias)
    sizes = (vector_strides(*vectors), (layout.channel_stride, layout.position_stride), channels, layout.positions, num_groups)
    constants: dict[str, Any] = {
        "SILU": activation is not None, "WIDTH": layout.width, "COUNT": tiles.group_count, "CHANNELS": tiles.channels,
        "POSITIONS": tiles.positions, "num_warps": tiles.warps, "maxnreg": most_registers(tiles, layout, x.dtype),
    }  # fmt: skip
    if tiles.whole:
        launch(_whole_kernel, batch * tiles.channel_blocks, *read_in, *written, *sizes, tiles.channel_blocks, **constants)
    else:
        _in_two_passes(read_in, written, sizes, tiles, batch, constants)
    if of_weight is not None or of_bias is not None:
        launch(_batch_kernel, triton.cdiv(channels, 32), of_weight, of_bias, grad_weight, grad_bias, batch, channels, DEPTH=64, CHANNELS=32)
    found = (grad_x, grad_weight, grad_bias, grad_scale, grad_shift)
    return tuple(absent(x) if f is None else f for f in found)


def _in_two_passes(read_in: tuple, written: tuple, sizes: tuple, tiles: Tiles, batch: int, constants: dict[str, Any]) -> None:
    x, grad_x, parameters = read_in[1], written[0], written[1:]
    _, strides, channels, _, groups = sizes
    dtype, rows = compute_dtype(x), strides[0] == 1
    of_groups = None if grad_x is None else x.new_empty((2, batch, groups, tiles.parts * tiles.runs), dtype=dtype)
    of_parts = None if all(p is None for p in parameters) else x.new_empty((2, batch, tiles.runs, channels), dtype=dtype)
    accumulator = tl.float64 if x.element_size() == 8 else tl.float32
    launch(
        _sums_kernel, batch * tiles.channel_blocks * tiles.runs, *read_in, of_groups, of_parts, *sizes,
        tiles.channel_blocks, tiles.parts, tiles.runs, tiles.run, ROWS=rows, ACCUMULATOR=accumulator, **constants,
    )  # fmt: skip
    blocks = 1 if grad_x is None else tiles.position_blocks
    launch(
        _elements_kernel, batch * tiles.channel_blocks * blocks, *read_in, of_groups, of_parts, *written, *sizes,
        tiles.channel_blocks, blocks, tiles.parts, tiles.runs, ROWS=rows, TERMS=terms_at_once(tiles), **constants,
    )  # fmt: skip
