"""Sums in an order that depends on what is summed alone, chunk by chunk and then over the chunks: over each sample, and over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
def _add_rows_kernel(
    partials, outs, groups, rows, chunks, channels, CHUNK: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Sums of each of partials [groups, rows, channels] over chunks of rows -> its out [groups, chunks, channels]."""
    program = tl.program_id(0).to(tl.int64)
    pieces = tl.cdiv(channels, WIDTH)
    columns = program % pieces * WIDTH + tl.arange(0, WIDTH)
    item = program // pieces % (groups * chunks)
    which = program // pieces // (groups * chunks)
    first = item % chunks * CHUNK
    stop = tl.minimum(first + CHUNK, rows)
    mask = columns < channels
    for i in tl.static_range(len(partials)):
        if which == i:
            of_group = partials[i] + item // chunks * rows * channels
            sums = tl.zeros([DEPTH, WIDTH], of_group.dtype.element_ty)
            for start in range(first, stop, DEPTH):
                r = start + tl.arange(0, DEPTH)
                inside = (r < stop)[:, None] & mask[None, :]
                sums += tl.load(of_group + r[:, None].to(tl.int64) * channels + columns[None, :], mask=inside, other=0.0)
            tl.store(outs[i] + item * channels + columns, tl.sum(sums, 0), mask=mask)


def add_rows(partials: Sequence[Tensor], groups: int, outs: Sequence[Tensor]) -> None:
    """Adds the rows of each group, those next to each other, of every one of partials [groups * rows, C] into its out of groups * C."""
    while partials:
        rows, channels = partials[0].shape[0] // groups, partials[0].shape[1]
        chunks = max(1, triton.cdiv(rows, ROWS_PER_CHUNK))
        into = outs if chunks == 1 else [p.new_empty((groups * chunks, channels)) for p in partials]
        programs = len(partials) * groups * chunks * triton.cdiv(channels, 64)
        # ptxas left to itself spills a little of six sums to have one program more on a multiprocessor.
        limit: dict[str, Any] = {"maxnreg": 48} if len(partials) > 4 else {}
        launch(
            _add_rows_kernel, programs, tuple(partials), tuple(into), groups, rows, chunks, channels,
            CHUNK=ROWS_PER_CHUNK, WIDTH=64, DEPTH=16, **limit,
        )  # fmt: skip
        if chunks == 1:
            return
        partials = into
