"""Sums in an order that depends on what is summed alone, chunk by chunk and then over the chunks: over each sample, and over rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import compute_dtype, launch

BLOCK = 1024
BLOCKS_PER_CHUNK = 4
CHUNK = BLOCK * BLOCKS_PER_CHUNK
ROWS_PER_CHUNK = 256


@triton.jit
def locate(elements, chunks, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr):
    """This program's sample, and its chunk's first element in the sample. Programs go through the chunks of sample after sample."""
    program = tl.program_id(0).to(tl.int64)
    return program // chunks, program % chunks * BLOCK * BLOCKS_PER_CHUNK


@triton.jit
def _finish_kernel(partial, out, chunks, divisor, WIDTH: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float64)
    for first in range(0, chunks, WIDTH):
        index = first + tl.arange(0, WIDTH)
        total += tl.load(partial + sample * chunks + index, mask=index < chunks, other=0.0)
    tl.store(out + sample, tl.sum(total) / divisor)


def sum_samples(
    kernel: triton.JITFunction, inputs: tuple[Tensor, ...], sums: int, *args: object, divisor: int = 1, **constants
) -> list[Tensor]:
    """`sums` sums over each sample of inputs[0], divided by divisor: [B] each.

    kernel(*inputs, *results, elements, chunks, divisor, *args, BLOCK, BLOCKS_PER_CHUNK) runs once for every chunk (see `locate`) and
    stores its sums, divided by divisor, in element program_id of the results.
    """
    x = inputs[0]
    batch = x.shape[0]
    elements = x.numel() // batch if batch else 0
    chunks = max(1, triton.cdiv(elements, CHUNK))
    constants = {"BLOCK": BLOCK, "BLOCKS_PER_CHUNK": BLOCKS_PER_CHUNK, **constants}
    out = [x.new_empty(batch, dtype=compute_dtype(x)) for _ in range(sums)]
    if chunks == 1:
        launch(kernel, batch, *inputs, *out, elements, chunks, divisor, *args, **constants)
        return out
    partial = [x.new_empty(batch * chunks, dtype=torch.float64) for _ in range(sums)]
    launch(kernel, batch * chunks, *inputs, *partial, elements, chunks, 1, *args, **constants)
    for of_chunks, total in zip(partial, out, strict=True):
        launch(_finish_kernel, batch, of_chunks, total, chunks, divisor, WIDTH=256)
    return out


@triton.jit
def _add_rows_kernel(partial, out, rows, channels, CHUNK: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """Sums of [groups, rows, channels] over chunks of rows -> [groups, chunks, channels]."""
    program = tl.program_id(0).to(tl.int64)
    pieces = tl.cdiv(channels, WIDTH)
    chunks = tl.cdiv(rows, CHUNK)
    item = program // pieces
    columns = program % pieces * WIDTH + tl.arange(0, WIDTH)
    first = item % chunks * CHUNK
    stop = tl.minimum(first + CHUNK, rows)
    mask = columns < channels
    partial += item // chunks * rows * channels
    sums = tl.zeros([DEPTH, WIDTH], partial.dtype.element_ty)
    for start in range(first, stop, DEPTH):
        r = start + tl.arange(0, DEPTH)
        inside = (r < stop)[:, None] & mask[None, :]
        sums += tl.load(partial + r[:, None].to(tl.int64) * channels + columns[None, :], mask=inside, other=0.0)
    tl.store(out + item * channels + columns, tl.sum(sums, 0), mask=mask)


def add_rows(partial: Tensor, argument: Tensor) -> Tensor:
    """The gradient of an argument [C] or [B, C] from partial sums [rows, C], those of a sample next to each other; the zero of no rows."""
    groups = argument.shape[0] if argument.dim() > 1 else 1
    channels = partial.shape[1]
    if partial.numel() == 0:
        return argument.new_zeros(argument.shape)
    rows = partial.shape[0] // groups
    while True:
        chunks = triton.cdiv(rows, ROWS_PER_CHUNK)
        out = argument.new_empty(argument.shape) if chunks == 1 else partial.new_empty((groups * chunks, channels))
        programs = groups * chunks * triton.cdiv(channels, 64)
        launch(_add_rows_kernel, programs, partial, out, rows, channels, CHUNK=ROWS_PER_CHUNK, WIDTH=64, DEPTH=16)
        if chunks == 1:
            return out
        partial, rows = out, chunks
