"""Sampling steps on GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import compute_dtype, launch, widen
from ._samples import WARPS, or_absent, stride, wanted
from ._sums import BLOCK, BLOCKS_PER_CHUNK, CHUNK, locate, sum_samples
from .philox import POSTERIOR, normals, seed_beside


def _launch_chunks(kernel: triton.JITFunction, x: Tensor, *args: object) -> None:
    """Runs kernel(*args, elements, chunks, BLOCK, BLOCKS_PER_CHUNK) for every chunk of every sample of x."""
    if x.numel() == 0:
        return
    elements = x.numel() // x.shape[0]
    chunks = triton.cdiv(elements, CHUNK)
    programs = x.shape[0] * chunks
    launch(kernel, programs, *args, elements, chunks, BLOCK=BLOCK, BLOCKS_PER_CHUNK=BLOCKS_PER_CHUNK, num_warps=WARPS)


@triton.jit
def _posterior_coefficients(sigma_s, sigma_t, dtype: tl.constexpr):
    """What z_t, the denoised sample and the noise are multiplied by. In float64: some GPUs are slow at it, so once for a chunk."""
    s = sigma_s.to(tl.float64)
    t = sigma_t.to(tl.float64)
    kept = s / t
    forgotten = (t - s) * (t + s) / (t * t)
    return (kept * kept).to(dtype), forgotten.to(dtype), (s * tl.sqrt(forgotten)).to(dtype)


@triton.jit(do_not_specialize=["offset"])
def _posterior_kernel(
    denoised, noisy, sigma_s, sigma_t, s_stride, t_stride, seed, offset, out, elements, chunks,
    BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype: tl.constexpr = tl.float64 if denoised.dtype.element_ty == tl.float64 else tl.float32
    kept, forgotten, spread = _posterior_coefficients(tl.load(sigma_s + sample * s_stride), tl.load(sigma_t + sample * t_stride), dtype)
    key = tl.load(seed)
    for block in range(BLOCKS_PER_CHUNK):
        first = begin + block * BLOCK
        index = first + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        x = widen(tl.load(noisy + at, mask=mask, other=0.0))
        d = widen(tl.load(denoised + at, mask=mask, other=0.0))
        z = normals(key, POSTERIOR, sample + offset, first, BLOCK).to(dtype)
        tl.store(out + at, kept * x + forgotten * d + spread * z, mask=mask)


def posterior_sample(denoised: Tensor, noisy: Tensor, sigma_s: Tensor, sigma_t: Tensor, seed: Tensor, offset: int) -> Tensor:
    """See fastdiff_kernels.ops.posterior_sample."""
    out = denoised.new_empty(denoised.shape)
    _launch_chunks(
        _posterior_kernel, denoised, denoised.contiguous(), noisy.contiguous(), sigma_s, sigma_t, stride(sigma_s), stride(sigma_t),
        seed_beside(seed, denoised), offset, out,
    )  # fmt: skip
    return out


@triton.jit
def _posterior_gradient_kernel(
    grad, sigma_s, sigma_t, s_stride, t_stride, to_denoised, to_noisy, elements, chunks,
    BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    kept, forgotten, _ = _posterior_coefficients(tl.load(sigma_s + sample * s_stride), tl.load(sigma_t + sample * t_stride), dtype)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        g = widen(tl.load(grad + at, mask=mask, other=0.0))
        if to_denoised is not None:
            tl.store(to_denoised + at, forgotten * g, mask=mask)
        if to_noisy is not None:
            tl.store(to_noisy + at, kept * g, mask=mask)


def posterior_sample_backward(
    grad0: Tensor, denoised: Tensor, noisy: Tensor, sigma_s: Tensor, sigma_t: Tensor, seed: Tensor, offset: int, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """(1 - r) grad and r grad, r = (sigma_s / sigma_t)^2."""
    gradients = wanted(denoised, needs)
    _launch_chunks(_posterior_gradient_kernel, denoised, grad0.contiguous(), sigma_s, sigma_t, stride(sigma_s), stride(sigma_t), *gradients)
    return or_absent(gradients, denoised)


@triton.jit
def _step_coefficients(sigma, sigma_next, dtype: tl.constexpr):
    """x_next = kept x + replaced D."""
    here = sigma.to(tl.float64)
    there = sigma_next.to(tl.float64)
    return (there / here).to(dtype), ((here - there) / here).to(dtype)


@triton.jit
def _guided_block(denoised, uncond, scale, at, mask):
    d = widen(tl.load(denoised + at, mask=mask, other=0.0))
    if uncond is not None:
        u = widen(tl.load(uncond + at, mask=mask, other=0.0))
        d = u + scale * (d - u)
    return d


@triton.jit
def _step_kernel(
    x, denoised, change, elements, chunks, divisor, uncond, sigma, sigma_next, guidance, sigma_stride, next_stride, guidance_stride, out,
    BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    kept, replaced = _step_coefficients(tl.load(sigma + sample * sigma_stride), tl.load(sigma_next + sample * next_stride), dtype)
    scale = tl.load(guidance + sample * guidance_stride)
    # From the nearer end, so that a step to sigma_next = 0 is exactly D, and a short one loses nothing of x.
    from_x = kept > 0.5
    factor = tl.where(from_x, -replaced, kept)
    moved = tl.zeros((BLOCK,), dtype)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        here = widen(tl.load(x + at, mask=mask, other=0.0))
        d = _guided_block(denoised, uncond, scale, at, mask)
        tl.store(out + at, tl.where(from_x, here, d) + factor * (here - d), mask=mask)
        moved += tl.abs(d - here)
    total = tl.abs(replaced).to(tl.float64) * tl.sum(moved).to(tl.float64)
    tl.store(change + tl.program_id(0), total / divisor)


def guided_step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, uncond: Tensor | None, guidance: Tensor
) -> tuple[Tensor, Tensor]:
    """See fastdiff_kernels.ops.guided_step."""
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out, x.new_full(x.shape[:1], torch.nan, dtype=compute_dtype(x))
    levels = (sigma, sigma_next, guidance)
    args = (None if uncond is None else uncond.contiguous(), *levels, *map(stride, levels), out)
    inputs = (x.contiguous(), denoised.contiguous())
    (change,) = sum_samples(_step_kernel, inputs, 1, *args, divisor=x.numel() // x.shape[0], num_warps=WARPS)
    return out, change


@triton.jit
def _step_gradient_kernel(
    grad_next, grad_change, x, denoised, uncond, sigma, sigma_next, guidance, sigma_stride, next_stride, guidance_stride,
    to_x, to_denoised, to_uncond, elements, chunks, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    kept, replaced = _step_coefficients(tl.load(sigma + sample * sigma_stride), tl.load(sigma_next + sample * next_stride), dtype)
    scale = tl.load(guidance + sample * guidance_stride)
    per_element = None if grad_change is None else tl.load(grad_change + sample) * tl.abs(replaced) / elements.to(dtype)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        through_x = tl.zeros((BLOCK,), dtype)
        through_d = tl.zeros((BLOCK,), dtype)
        if grad_next is not None:
            g = widen(tl.load(grad_next + at, mask=mask, other=0.0))
            through_x = kept * g
            through_d = replaced * g
        if grad_change is not None:
            away = _guided_block(denoised, uncond, scale, at, mask) - widen(tl.load(x + at, mask=mask, other=0.0))
            # NaN stays NaN.
            towards = per_element * tl.where(away > 0.0, 1.0, tl.where(away < 0.0, -1.0, away))
            through_x -= towards
            through_d += towards
        if to_x is not None:
            tl.store(to_x + at, through_x, mask=mask)
        if to_denoised is not None:
            tl.store(to_denoised + at, through_d if uncond is None else scale * through_d, mask=mask)
        if to_uncond is not None:
            tl.store(to_uncond + at, (1.0 - scale) * through_d, mask=mask)


def guided_step_backward(
    grad0: Tensor | None,
    grad1: Tensor | None,
    x: Tensor,
    denoised: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    uncond: Tensor | None,
    guidance: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Through x_next and through the change, each of which may have gone unused."""
    gradients, levels = wanted(x, needs), (sigma, sigma_next, guidance)
    dense = [None if t is None else t.contiguous() for t in (grad0, grad1, x, denoised, uncond)]
    _launch_chunks(_step_gradient_kernel, x, *dense, *levels, *map(stride, levels), *gradients)
    return or_absent(gradients, x)
