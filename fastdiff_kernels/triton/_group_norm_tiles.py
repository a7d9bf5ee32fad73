"""How group norm goes through a sample: in tiles of some channels at some positions, in whichever order they lie in memory.

A tile has whole groups or a part of one. Tiles depend on the shape and layout of one sample alone, so that no result depends on the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import widen
from ._tuned import tuned

# A group of at most so many bytes stays in the registers of one program from the first read to the last write; half as many in backward,
# which holds two operands, and half where the vectors of many channels take registers too.
# One program should read that in about the time of a launch, the least that splitting it would cost; no GPU has measured it.
_WHOLE = 32768
# Elements of a tile of a larger group, and of a small tile that takes several groups.
_PART = 4096
_FEW = 512
# Groups of a tile, and entries of the table of which of its channels belong to which of them: one warp may have to hold all.
_MOST_GROUPS = 16
_OWN = 1024
# Partial results of one group that each program of the second pass loads together; of several groups it loads fewer for each.
PARTIAL = 256
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Layout(NamedTuple):
    """x as [batch, channels, positions] with the distances between channels and between positions of a sample."""

    format: torch.memory_format
    channels: int
    positions: int
    groups: int
    channel_stride: int
    position_stride: int

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups


class Tiles(NamedTuple):
    """Tiles of one sample: blocks of channels times blocks of positions."""

    whole: bool
    """Whether a tile has all positions of the groups in it."""
    group_count: int
    """Whole groups in a tile, or 1 where a tile has a part of one."""
    channels: int
    positions: int
    parts: int
    """Blocks of channels that a group takes."""
    channel_blocks: int
    position_blocks: int
    run: int
    """Blocks of positions that one program of the first pass goes through."""
    warps: int

    @property
    def per_sample(self) -> int:
        """How many there are."""
        return self.channel_blocks * self.position_blocks

    @property
    def runs(self) -> int:
        """Programs of the first pass along the positions."""
        return triton.cdiv(self.position_blocks, self.run)


def most_registers(tiles: Tiles, layout: Layout, dtype: torch.dtype) -> int:
    """Of a thread. Left to itself, ptxas spills a little here and there to fit more programs on a multiprocessor; a tile of one warp may
    have many channels for its few elements, and their vectors in registers; planes that are not aligned take an address an element."""
    if tiles.warps == 1:
        return 168
    many = dtype == torch.float64 or (layout.position_stride == 1 and layout.positions % 16 != 0)
    return min(255, 2048 // tiles.warps) if many else 128


def layout_of(x: Tensor, groups: int) -> Layout:
    """The layout in which x is read and its output written."""
    channels = x.shape[1]
    positions = x.numel() // max(x.shape[0] * channels, 1)
    last = _CHANNELS_LAST.get(x.dim(), torch.contiguous_format)
    if not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return Layout(last, channels, positions, groups, 1, channels)
    return Layout(torch.contiguous_format, channels, positions, groups, positions, 1)


def tiles_for(layout: Layout, x: Tensor, operands: int, gpu: int) -> Tiles:
    """`tiles_of` a sample of x, on the warps that a GPU has been measured to want."""
    tiles = tiles_of(layout, x.element_size(), operands)
    order = "rows" if layout.channel_stride == 1 else "planes"
    kernel = f"group norm {'backward' if operands == 2 else 'forward'}, {'whole groups' if tiles.whole else 'parts'} of {order}"
    return tuned(kernel, gpu, x.dtype, tiles.channels * tiles.positions, tiles)


def tiles_of(layout: Layout, itemsize: int, operands: int) -> Tiles:
    """The tiles of a sample of which `operands` tensors are read, their elements of `itemsize` bytes."""
    groups, width, positions = layout.groups, layout.width, layout.positions
    block, positions_block = triton.next_power_of_2(width), triton.next_power_of_2(positions)
    rows = layout.channel_stride == 1
    limit = _WHOLE // (itemsize * operands * (2 if rows and operands == 1 else 1))
    if block * positions_block <= limit:
        # Sectors of 32 bytes are read for one program alone.
        least = max(32 // itemsize if rows else 1, _FEW // positions_block)
        wide = min(max(block, triton.next_power_of_2(least)), limit // positions_block, triton.next_power_of_2(layout.channels))
        count = _groups_in(wide, groups, width, itemsize)
        block = triton.next_power_of_2(count * width)
        return Tiles(True, count, block, positions_block, 1, triton.cdiv(groups, count), 1, 1, _warps(block * positions_block))
    limit = _PART // max(1, itemsize // 4)
    if rows:
        block, count = _block_of_rows(layout, itemsize)
        positions_block = min(positions_block, limit // operands // block)
    else:
        positions_block = _fullest(positions, min(positions_block, limit // min(block, 2)), 4)
        block, count = _fullest(width, min(block, limit // positions_block), 2), 1
    parts = triton.cdiv(width, block) if count == 1 else 1
    position_blocks = triton.cdiv(positions, positions_block)
    chunks = max(1, PARTIAL // min(triton.next_power_of_2(count), 8) // parts)
    channel_blocks = groups * parts if count == 1 else triton.cdiv(groups, count)
    run = triton.cdiv(position_blocks, chunks)
    # Fewer warps to a tile leave room for more tiles, whose reads and writes then overlap; but a second operand and the vectors of many
    # channels need the registers of more warps.
    warps = _warps(block * positions_block * operands // (1 if rows else 2))
    return Tiles(False, count, block, positions_block, parts, channel_blocks, position_blocks, run, warps)


def _warps(elements: int) -> int:
    """16 elements for each thread."""
    return max(1, min(16, elements // 512))


def _groups_in(block: int, groups: int, width: int, itemsize: int) -> int:
    """How many groups, of those that fit a block of channels, let its rows be read in the widest loads; the most of those."""
    fitting = range(1, max(1, min(groups, block // width)) + 1)
    few = [n for n in fitting if n == 1 or (n <= _MOST_GROUPS and triton.next_power_of_2(n) * triton.next_power_of_2(n * width) <= _OWN)]
    return max(few, key=lambda n: (_aligned(n * width * itemsize), n))


def _aligned(size: int) -> int:
    return min(size & -size, 8)


def _block_of_rows(layout: Layout, itemsize: int) -> tuple[int, int]:
    """Channels and groups of a block where channels lie next to each other: at least 128 bytes, with little of it empty."""
    if layout.width > 256:
        return 128, 1
    least, most = (triton.next_power_of_2(n) for n in (max(128 // itemsize, layout.width), layout.channels))
    candidates = [min(least * factor, most) for factor in (1, 2)]
    counts = [_groups_in(c, layout.groups, layout.width, itemsize) for c in candidates]

    def merit(candidate: int, count: int) -> tuple[float, ...]:
        taken = count * layout.width
        return _aligned(taken * itemsize), taken / candidate, -candidate

    _, count = max(zip(candidates, counts, strict=True), key=lambda pair: merit(*pair))
    return triton.next_power_of_2(count * layout.width), count


def _fullest(length: int, most: int, steps: int) -> int:
    """The largest of the powers of two most, most / 2, ... whose multiples overshoot length by little; otherwise by the least."""
    sizes = [most >> i for i in range(steps) if most >> i]
    covered = [triton.cdiv(length, size) * size for size in sizes]
    return next((size for size, cover in zip(sizes, covered, strict=True) if 7 * cover <= 8 * length), sizes[covered.index(min(covered))])


@triton.jit
def locate(program, channel_blocks, position_blocks, ROWS: tl.constexpr):
    """Sample, block of channels and block of positions of a program; neighbours in memory are neighbours in number."""
    blocks = channel_blocks * position_blocks
    b = program // blocks
    tile = program % blocks
    if ROWS:
        block = tile % channel_blocks
        position = tile // channel_blocks
    else:
        block = tile // position_blocks
        position = tile % position_blocks
    return b.to(tl.int64), block, position


@triton.jit
def channels_of(block, channels, parts, WIDTH: tl.constexpr, COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    """A block's channels, which of them are there, its groups, and for each of those which channels are its own."""
    part = block % parts
    first = block // parts * COUNT
    local = part * CHANNELS + tl.arange(0, CHANNELS)
    c = first * WIDTH + local
    present = (local < COUNT * WIDTH) & (c < channels)
    groups: tl.constexpr = triton.next_power_of_2(COUNT)
    g = tl.arange(0, groups)
    own = (local // WIDTH)[None, :] == g[:, None]
    return c, present, first + g, g < COUNT, own & present[None, :]


@triton.jit
def over_groups(of_channels, own):
    """A quantity of channels summed over each group's."""
    return tl.sum(tl.where(own, of_channels[None, :], 0.0), 1)


@triton.jit
def of_channels(of_groups, own):
    """A quantity of groups for each channel."""
    return tl.sum(tl.where(own, of_groups[:, None], 0.0), 0)


@triton.jit
def addresses(b, c, first, channels, positions, strides, present, POSITIONS: tl.constexpr):
    """Where a tile's elements lie, and which are there."""
    p = (first + tl.arange(0, POSITIONS)).to(tl.int64)
    at = b * channels * positions + c.to(tl.int64)[:, None] * strides[0] + p[None, :] * strides[1]
    return at, present[:, None] & (p < positions)[None, :]


@triton.jit
def read(pointer, at, mask):
    """Elements of an operand, widened."""
    return widen(tl.load(pointer + at, mask=mask, other=0.0))


@triton.jit
def read_vector(pointer, b, strides, c, present, otherwise: tl.constexpr):
    """An operand [C] or [B, C] at some channels, widened; `otherwise` where it is None."""
    if pointer is None:
        vector = tl.full(c.shape, otherwise, tl.float32)
    else:
        vector = widen(tl.load(pointer + b * strides[0] + c.to(tl.int64) * strides[1], mask=present, other=0.0))
    return vector


@triton.jit
def read_affine(weight, bias, scale, shift, strides, b, c, present):
    """gain = weight (1 + scale) and offset = bias (1 + scale) + shift."""
    factor = 1.0 + read_vector(scale, b, strides[2], c, present, 0.0)
    gain = read_vector(weight, b, strides[0], c, present, 1.0) * factor
    offset = read_vector(bias, b, strides[1], c, present, 0.0) * factor + read_vector(shift, b, strides[3], c, present, 0.0)
    return gain, offset


@triton.jit
def activate(z, SILU: tl.constexpr):
    return z / (1.0 + tl.exp(-z)) if SILU else z


@triton.jit
def activate_gradient(z, SILU: tl.constexpr):
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-z))
        gradient = s * (1.0 + z * (1.0 - s))
    else:
        gradient = tl.zeros_like(z) + 1.0
    return gradient
