"""LCSS and denoising losses on GPU. Seeded noise is made again where it is used and never stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import absent, launch, widen
from ._sums import locate, sum_samples
from .philox import LCSS, normals, seed_beside

_BLOCK = 1024
# Four elements a thread; with twice as many, Blackwell's assembler spills in the sums.
_WARPS = 8


def _stride(constant: Tensor) -> int:
    """From one sample's constant to the next: [1] holds for all."""
    return 0 if constant.numel() == 1 else constant.stride(0)


def _or_absent(gradient: Tensor | None, x: Tensor) -> Tensor:
    return absent(x) if gradient is None else gradient


def _launch_blocks(kernel: triton.JITFunction, x: Tensor, *args: object) -> None:
    """Runs kernel(*args, elements, blocks) once for every block of every sample of x."""
    if x.numel() == 0:
        return
    elements = x.numel() // x.shape[0]
    blocks = triton.cdiv(elements, _BLOCK)
    launch(kernel, x.shape[0] * blocks, *args, elements, blocks, BLOCK=_BLOCK, num_warps=_WARPS)


@triton.jit
def _noise_at(noise, seed, offset, sample, begin, at, mask, BLOCK: tl.constexpr):
    """A block of the noise: stored, or drawn where `noise` is None."""
    drawn: tl.constexpr = noise is None
    return normals(tl.load(seed), LCSS, sample + offset, begin, BLOCK) if drawn else widen(tl.load(noise + at, mask=mask, other=0.0))


@triton.jit
def _ratio(a, b):
    """a / b, correctly rounded; the plain division of float32 is not."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit(do_not_specialize=["offset"])
def _perturb_kernel(x, sigma, sigma_stride, seed, offset, out, elements, blocks, BLOCK: tl.constexpr):
    sample, begin = locate(elements, blocks, BLOCK, 1)
    index = begin + tl.arange(0, BLOCK)
    mask = index < elements
    at = sample * elements + index
    result = _noise_at(None, seed, offset, sample, begin, at, mask, BLOCK)
    if x is not None:
        clean = widen(tl.load(x + at, mask=mask, other=0.0))
        result = clean + tl.load(sigma + sample * sigma_stride) * result.to(clean.dtype)
    tl.store(out + at, result, mask=mask)


def lcss_noise(x: Tensor, seed: Tensor, offset: int) -> Tensor:
    """See fastdiff_kernels.ops.lcss_noise."""
    out = x.new_empty(x.shape)
    _launch_blocks(_perturb_kernel, out, None, None, 0, seed_beside(seed, x), offset, out)
    return out


def lcss_perturb(x: Tensor, sigma: Tensor, seed: Tensor, offset: int) -> Tensor:
    """See fastdiff_kernels.ops.lcss_perturb."""
    out = x.new_empty(x.shape)
    _launch_blocks(_perturb_kernel, out, x.contiguous(), sigma, _stride(sigma), seed_beside(seed, x), offset, out)
    return out


def lcss_perturb_backward(grad0: Tensor, x: Tensor, sigma: Tensor, seed: Tensor, offset: int, needs: Sequence[bool]) -> Tensor:
    """A copy, since an op must not return its argument."""
    return grad0.clone(memory_format=torch.contiguous_format)


@triton.jit(do_not_specialize=["offset"])
def _lcss_kernel(
    score, loss, elements, chunks, divisor, noise, seed, offset,
    sigma, gamma, weight, sigma_stride, gamma_stride, weight_stride,
    BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype = tl.float64 if score.dtype.element_ty == tl.float64 else tl.float32
    products = tl.zeros((BLOCK,), dtype)
    squares = tl.zeros((BLOCK,), dtype)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        first = begin + block * BLOCK
        index = first + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        s = widen(tl.load(score + at, mask=mask, other=0.0))
        products += s * _noise_at(noise, seed, offset, sample, first, at, mask, BLOCK).to(dtype)
        squares += s * s
    # The two sums cancel near the optimum: they meet in float64.
    factor = _ratio(tl.load(gamma + sample * gamma_stride), tl.load(sigma + sample * sigma_stride)).to(tl.float64)
    value = factor * tl.sum(products).to(tl.float64) + 0.5 * tl.sum(squares).to(tl.float64)
    tl.store(loss + tl.program_id(0), tl.load(weight + sample * weight_stride).to(tl.float64) * value)


def _lcss(score: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int, *constants: Tensor) -> Tensor:
    noise = None if noise is None else noise.contiguous()
    args = (noise, seed, offset, *constants, *map(_stride, constants))
    (loss,) = sum_samples(_lcss_kernel, (score.contiguous(),), 1, *args, num_warps=_WARPS)
    return loss


def lcss_loss(score: Tensor, noise: Tensor, sigma: Tensor, gamma: Tensor, weight: Tensor) -> Tensor:
    """See fastdiff_kernels.ops.lcss_loss, for stored noise."""
    return _lcss(score, noise, None, 0, sigma, gamma, weight)


def lcss_loss_seeded(score: Tensor, seed: Tensor, sigma: Tensor, gamma: Tensor, weight: Tensor, offset: int) -> Tensor:
    """See fastdiff_kernels.ops.lcss_loss, for a seed."""
    return _lcss(score, None, seed_beside(seed, score), offset, sigma, gamma, weight)


@triton.jit(do_not_specialize=["offset"])
def _lcss_gradient_kernel(
    grad, score, noise, seed, offset, sigma, gamma, weight, sigma_stride, gamma_stride, weight_stride,
    grad_score, grad_noise, elements, blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, blocks, BLOCK, 1)
    index = begin + tl.arange(0, BLOCK)
    mask = index < elements
    at = sample * elements + index
    factor = _ratio(tl.load(gamma + sample * gamma_stride), tl.load(sigma + sample * sigma_stride))
    scale = tl.load(grad + sample) * tl.load(weight + sample * weight_stride)
    s = widen(tl.load(score + at, mask=mask, other=0.0))
    if grad_score is not None:
        z = _noise_at(noise, seed, offset, sample, begin, at, mask, BLOCK).to(s.dtype)
        tl.store(grad_score + at, scale * (factor * z + s), mask=mask)
    if grad_noise is not None:
        tl.store(grad_noise + at, scale * factor * s, mask=mask)


def lcss_loss_backward(
    grad0: Tensor, score: Tensor, noise: Tensor, sigma: Tensor, gamma: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """grad weight (gamma / sigma noise + score), grad weight gamma / sigma score."""
    grad_score, grad_noise = (score.new_empty(score.shape) if need else None for need in needs)
    constants = (sigma, gamma, weight)
    _launch_blocks(
        _lcss_gradient_kernel, score, grad0.contiguous(), score.contiguous(), noise.contiguous(), None, 0,
        *constants, *map(_stride, constants), grad_score, grad_noise,
    )  # fmt: skip
    return _or_absent(grad_score, score), _or_absent(grad_noise, score)


def lcss_loss_seeded_backward(
    grad0: Tensor, score: Tensor, seed: Tensor, sigma: Tensor, gamma: Tensor, weight: Tensor, offset: int, needs: Sequence[bool]
) -> Tensor:
    """grad weight (gamma / sigma noise + score)."""
    grad_score, constants = score.new_empty(score.shape), (sigma, gamma, weight)
    _launch_blocks(
        _lcss_gradient_kernel, score, grad0.contiguous(), score.contiguous(), None, seed_beside(seed, score), offset,
        *constants, *map(_stride, constants), grad_score, None,
    )  # fmt: skip
    return grad_score


@triton.jit
def _denoising_kernel(
    denoised, clean, loss, elements, chunks, divisor, weight, weight_stride, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    squares = tl.zeros((BLOCK,), tl.float64 if denoised.dtype.element_ty == tl.float64 else tl.float32)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        error = widen(tl.load(denoised + at, mask=mask, other=0.0)) - widen(tl.load(clean + at, mask=mask, other=0.0))
        squares += error * error
    tl.store(loss + tl.program_id(0), tl.load(weight + sample * weight_stride).to(tl.float64) * tl.sum(squares).to(tl.float64))


def denoising_loss(denoised: Tensor, clean: Tensor, weight: Tensor) -> Tensor:
    """See fastdiff_kernels.ops.denoising_loss."""
    inputs = (denoised.contiguous(), clean.contiguous())
    (loss,) = sum_samples(_denoising_kernel, inputs, 1, weight, _stride(weight), num_warps=_WARPS)
    return loss


@triton.jit
def _denoising_gradient_kernel(
    grad, denoised, clean, weight, weight_stride, grad_denoised, grad_clean, elements, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    sample, begin = locate(elements, blocks, BLOCK, 1)
    index = begin + tl.arange(0, BLOCK)
    mask = index < elements
    at = sample * elements + index
    factor = 2.0 * tl.load(grad + sample) * tl.load(weight + sample * weight_stride)
    gradient = factor * (widen(tl.load(denoised + at, mask=mask, other=0.0)) - widen(tl.load(clean + at, mask=mask, other=0.0)))
    if grad_denoised is not None:
        tl.store(grad_denoised + at, gradient, mask=mask)
    if grad_clean is not None:
        tl.store(grad_clean + at, -gradient, mask=mask)


def denoising_loss_backward(grad0: Tensor, denoised: Tensor, clean: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """2 grad weight (denoised - clean), and its negative."""
    grad_denoised, grad_clean = (denoised.new_empty(denoised.shape) if need else None for need in needs)
    _launch_blocks(
        _denoising_gradient_kernel, denoised, grad0.contiguous(), denoised.contiguous(), clean.contiguous(),
        weight, _stride(weight), grad_denoised, grad_clean,
    )  # fmt: skip
    return _or_absent(grad_denoised, denoised), _or_absent(grad_clean, denoised)
