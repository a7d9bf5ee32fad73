"""Scales the samples of a batch in place, and leaves those alone whose factor is 1: the device decides, nothing waits for it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import launch, widen
from ._sums import BLOCK, BLOCKS_PER_CHUNK, CHUNK, locate


@triton.jit
def _scale_kernel(x, factor, factor_stride, elements, chunks, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr):
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    scale = tl.load(factor + sample * factor_stride)
    if scale != 1.0:
        for block in tl.static_range(BLOCKS_PER_CHUNK):
            index = begin + block * BLOCK + tl.arange(0, BLOCK)
            mask = index < elements
            at = sample * elements + index
            tl.store(x + at, scale * widen(tl.load(x + at, mask=mask, other=0.0)), mask=mask)


def scale_samples_(x: Tensor, factor: Tensor) -> None:
    """x[b] *= factor[b] for x [B, ...] contiguous and factor [B] of any stride."""
    if x.numel() == 0:
        return
    elements = x.numel() // x.shape[0]
    chunks = triton.cdiv(elements, CHUNK)
    launch(
        _scale_kernel, x.shape[0] * chunks, x, factor, factor.stride(0), elements, chunks,
        BLOCK=BLOCK, BLOCKS_PER_CHUNK=BLOCKS_PER_CHUNK, num_warps=8,
    )  # fmt: skip
