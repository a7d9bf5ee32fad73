"""Tiles of attention on GPU: how a head's width is split, rows are loaded and products are taken; and the sizes of blocks.

A width that is no power of two is held in two pieces, 72 as 64 + 16, so that little of a product is spent on padding. Loops over keys or
queries run unmasked over whole blocks; the rest is one masked block at the end.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
# In a tile, whose rows are told apart by 32 bits, as are strides.
MOST_ROWS = 256


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """sums + a b; sums may be None."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def exponential(logits, scale, shift, PRECISION: tl.constexpr):
    """e^(scale logits - shift), the shift [rows, 1] or [1, columns]."""
    power = logits * (scale * LOG2_E) - shift * LOG2_E
    if PRECISION == "ieee":
        # The difference first: it is small where the result is not, and so is what its product with a rounded constant loses.
        power = (logits * scale - shift) * LOG2_E
    return tl.exp2(power)


@triton.jit
def narrow(x, like, WIDEN: tl.constexpr):
    """x in the dtype in which it is multiplied by `like`."""
    return x if WIDEN else x.to(like.dtype)


@triton.jit
def offset(strides, b, n, h, UNIT: tl.constexpr):
    """Where row n of head h of sample b begins."""
    return b * (strides[0] * UNIT) + n * (strides[1] * UNIT) + h * (strides[2] * UNIT)


@triton.jit
def _pointers(base, strides, start, columns, ROWS: tl.constexpr, UNIT: tl.constexpr):
    """Of a tile that begins at row `start` of a head. Only the beginning is far enough from the base for 64 bits."""
    step = strides[1] * UNIT
    return base + tl.cast(start, tl.int64) * step + (tl.arange(0, ROWS)[:, None] * step + columns[None, :])


@triton.jit
def load_rows(
    base, strides, start, stop, ROWS: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    UNIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Columns [FIRST, FIRST + SIZE) of a head's rows from `start`, zero from row `stop` (where MASKED) and from column WIDTH on."""
    columns = FIRST + tl.arange(0, SIZE)
    at = _pointers(base, strides, start, columns, ROWS, UNIT)
    exists = (start + tl.arange(0, ROWS) < stop)[:, None]
    if MASKED and FIRST + SIZE > WIDTH:
        tile = tl.load(at, mask=exists & (columns < WIDTH)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(at, mask=exists, other=0.0)
    elif FIRST + SIZE > WIDTH:
        tile = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_rows(
    base, strides, start, stop, values, ROWS: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    columns = FIRST + tl.arange(0, SIZE)
    exists = (start + tl.arange(0, ROWS) < stop)[:, None]
    mask = exists & (columns < WIDTH)[None, :] if FIRST + SIZE > WIDTH else exists
    tl.store(_pointers(base, strides, start, columns, ROWS, UNIT), values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def existing_keys(key_lengths, b, keys):
    """How many keys of sample b exist."""
    length = keys
    if key_lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(key_lengths + b), 0), keys).to(tl.int32)
    return length


def pieces(width: int) -> tuple[int, int]:
    """Two powers of two (or one and 0) that hold a row, with little padding: a tail of 16 beside a head of 128 takes too many registers."""
    whole = max(16, triton.next_power_of_2(width))
    head = whole // 2
    if whole == 16 or width == whole:
        return whole, 0
    tail = max(16, whole // 8, triton.next_power_of_2(width - head))
    return (head, tail) if head + tail < whole else (whole, 0)


def unit(x: Tensor) -> int:
    """Elements in 16 bytes."""
    return 16 // x.element_size()


def padded_width(x: Tensor) -> int:
    """The width of `aligned(x)`."""
    return triton.cdiv(x.shape[3], unit(x)) * unit(x)


def aligned(x: Tensor) -> Tensor:
    """x itself where its rows are made of adjacent elements, begin and end at multiples of 16 bytes and are not too far apart; otherwise
    such a copy, padded with zeros. Kernels that read x by single elements would hold many times as many addresses, more than there are
    registers for.
    """
    count, width = unit(x), x.shape[3]
    outer = _outer_strides(x)
    in_reach = max(outer[0], outer[1] * MOST_ROWS, outer[2]) < 2**31
    if x.stride(3) == 1 and x.data_ptr() % 16 == 0 and in_reach and not any(n % count for n in (width, *outer)):
        return x
    copy = x.new_zeros((*x.shape[:3], padded_width(x)))
    copy[..., :width] = x
    return copy


def _outer_strides(x: Tensor) -> tuple[int, ...]:
    # Nothing is a step away along a dimension of one.
    return tuple(x.stride(i) if x.shape[i] > 1 else 0 for i in range(3))


def strides(x: Tensor) -> tuple[int, ...]:
    """Distances from one sample, row and head to the next in units of 16 bytes, so that the compiler sees the alignment: it knows of an
    argument only whether 16 divides it."""
    return tuple(s // unit(x) for s in _outer_strides(x))


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, whose products are right in float32 alone."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def arithmetic(x: Tensor) -> dict[str, object]:
    """How products are taken. float32 is multiplied as such: tensor cores round it to 10 bits, or to 21 in three products."""
    return {"PRECISION": "ieee" if x.dtype == torch.float32 else "tf32", "WIDEN": interpreting()}
