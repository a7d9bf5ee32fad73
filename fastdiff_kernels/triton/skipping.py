"""Third-order criteria of AdaptiveDiffusion in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import launch, widen
from ._sums import locate, sum_samples


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
    third, last = sum_samples(_difference_kernel, latents, 2, divisor=x0.numel() // x0.shape[0])
    return third, last
