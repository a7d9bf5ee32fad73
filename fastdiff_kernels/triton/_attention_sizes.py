"""How many queries and keys a program of attention takes at a time, on how many warps and with how many loads in flight.

An analytic table, which measured rows of `_tuned` come before: the largest blocks whose sums stay in registers, with at least 64 rows to a
warp group where a GPU multiplies by those. The table asks for the width, the dtype, the GPU and, of the lengths, only for what one sample
has: a sample's result does not depend on its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._attention_tiles import pieces
from ._tuned import tuned


@dataclass(frozen=True)
class Sizes:
    """One row."""

    queries: int
    keys: int
    warps: int
    stages: int


# GPUs with 227 KiB of shared memory multiply by warp groups or in tensor memory; the others have 99 KiB at least.
_LARGE = (90, 100, 103)

# By the largest width, padding included, that a row is for: queries, keys, warps and stages of these kernels in turn.
_KERNELS = ("forward", "queries", "keys", "dual", "forward, long")
_Table = dict[int, tuple[tuple[int, ...], ...]]

_NARROW_LARGE: _Table = {
    64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (128, 64, 8, 3)),
    96: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2), (128, 64, 8, 3)),
    128: ((64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 4, 2), (128, 64, 8, 3)),
    192: ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (16, 32, 4, 2), (128, 64, 8, 2)),
    256: ((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 16, 8, 2), (64, 64, 8, 2)),
}  # fmt: skip

_NARROW_SMALL: _Table = {
    32: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
    64: ((64, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 2), (64, 32, 4, 2)),
    80: ((64, 32, 4, 3), (32, 32, 4, 2), (16, 32, 4, 2), (32, 32, 4, 2)),
    96: ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2), (16, 32, 4, 2)),
    128: ((64, 32, 4, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2)),
    192: ((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 4, 2)),
    256: ((32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 2)),
}  # fmt: skip

# float32 is multiplied without tensor cores; a second load in flight also keeps the compiler from holding whole rows in registers, and the
# LLVM of Triton 3.9 from an assertion that fails in the dual kernel.
_WIDE: _Table = {
    32: ((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 2)),
    64: ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 2)),
    96: ((32, 16, 8, 2), (16, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 2)),
    128: ((16, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 2)),
    256: ((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1)),
}  # fmt: skip

LONG = 1024
# Stands for a GPU's capability in Triton's interpreter.
INTERPRETER = 0


def separate(q: Tensor, gpu: int) -> bool:
    """Whether the gradients of keys and of values are made by two launches: their sums together fill a warp group's registers."""
    return q.shape[3] > 192 and q.dtype != torch.float32 and gpu in _LARGE


def sizes(kernel: str, q: Tensor, gpu: int) -> Sizes:
    """The row for a kernel, "forward", "queries", "keys" or "dual", at q's width and dtype on a GPU by its capability."""
    if gpu == INTERPRETER:
        # Every block costs it about the same; these are large enough for that, and small enough to need several.
        return Sizes(64, 32, 4, 2)
    width = sum(pieces(q.shape[3]))
    large = gpu in _LARGE
    if large and kernel == "forward" and q.shape[1] >= LONG and q.dtype != torch.float32:
        kernel = "forward, long"
    table = _WIDE if q.dtype == torch.float32 else _NARROW_LARGE if large else _NARROW_SMALL
    row = next(row for limit, row in table.items() if width <= limit)
    return tuned(f"attention {kernel}", gpu, q.dtype, width, Sizes(*row[_KERNELS.index(kernel)]))
