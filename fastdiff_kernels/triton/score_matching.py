"""LCSS and denoising losses on GPU. Seeded noise is made again where it is used and never stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import widen
from ._samples import WARPS, launch_blocks, or_absent, ratio, stride, wanted
from ._sums import locate, sum_samples
from .philox import LCSS, normals, seed_beside


@triton.jit
def _noise_at(noise, seed, offset, sample, begin, at, mask, BLOCK: tl.constexpr):
    """A block of the noise: stored, or drawn where `noise` is None."""
    drawn: tl.constexpr = noise is None
    return normals(tl.load(seed), LCSS, sample + offset, begin, BLOCK) if drawn else widen(tl.load(noise + at, mask=mask, other=0.0))


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
    launch_blocks(_perturb_kernel, out, None, None, 0, seed_beside(seed, x), offset, out)
    return out


def lcss_perturb(x: Tensor, sigma: Tensor, seed: Tensor, offset: int) -> Tensor:
    """See fastdiff_kernels.ops.lcss_perturb."""
    out = x.new_empty(x.shape)
    launch_blocks(_perturb_kernel, out, x.contiguous(), sigma, stride(sigma), seed_beside(seed, x), offset, out)
    return out


def lcss_perturb_backward(grad0: Tensor, x: Tensor, sigma: Tensor, seed: Tensor, offset: int, needs: Sequence[bool]) -> Tensor:
    """A copy, since an op must not return its argument."""
    return grad0.clone(memory_format=torch.contiguous_format)


@triton.jit
def _write_lcss_gradients(s, m, z, factor, scale, to_score, to_noise, to_mirrored, at, mask):
    """The gradients that are wanted of a block of the score s, the noise z and the mirrored score m."""
    if to_score is not None:
        tl.store(to_score + at, scale * (factor * z + s), mask=mask)
    if to_noise is not None:
        tl.store(to_noise + at, scale * factor * (s if m is None else s - m), mask=mask)
    if to_mirrored is not None:
        tl.store(to_mirrored + at, scale * (m - factor * z), mask=mask)


@triton.jit(do_not_specialize=["offset"])
def _lcss_kernel(
    score, loss, elements, chunks, divisor, mirrored, noise, seed, offset,
    sigma, gamma, weight, sigma_stride, gamma_stride, weight_stride, to_score, to_noise, to_mirrored,
    BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype = tl.float64 if score.dtype.element_ty == tl.float64 else tl.float32
    factor = ratio(tl.load(gamma + sample * gamma_stride), tl.load(sigma + sample * sigma_stride))
    # Each half of a pair weighs half.
    scale = tl.load(weight + sample * weight_stride) * (1.0 if mirrored is None else 0.5)
    products = tl.zeros((BLOCK,), dtype)
    squares = tl.zeros((BLOCK,), dtype)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        first = begin + block * BLOCK
        index = first + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        s = widen(tl.load(score + at, mask=mask, other=0.0))
        m = None if mirrored is None else widen(tl.load(mirrored + at, mask=mask, other=0.0))
        z = _noise_at(noise, seed, offset, sample, first, at, mask, BLOCK).to(dtype)
        products += (s if m is None else s - m) * z
        squares += s * s if m is None else s * s + m * m
        _write_lcss_gradients(s, m, z, factor, scale, to_score, to_noise, to_mirrored, at, mask)
    # The two sums cancel near the optimum: they meet in float64.
    value = factor.to(tl.float64) * tl.sum(products).to(tl.float64) + 0.5 * tl.sum(squares).to(tl.float64)
    tl.store(loss + tl.program_id(0), scale.to(tl.float64) * value)


def _lcss(
    score: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    mirrored: Tensor | None,
    constants: tuple[Tensor, ...],
    offset: int = 0,
    gradients: Sequence[Tensor | None] = (None, None, None),
) -> Tensor:
    operands = (_dense(mirrored), _dense(noise), seed, offset)
    args = (*operands, *constants, *map(stride, constants), *gradients)
    (loss,) = sum_samples(_lcss_kernel, (score.contiguous(),), 1, *args, num_warps=WARPS)
    return loss


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def lcss_loss(score: Tensor, noise: Tensor, mirrored: Tensor | None, sigma: Tensor, gamma: Tensor, weight: Tensor) -> Tensor:
    """See fastdiff_kernels.ops.lcss_loss, for stored noise."""
    return _lcss(score, noise, None, mirrored, (sigma, gamma, weight))


def lcss_loss_recorded(
    score: Tensor, noise: Tensor, mirrored: Tensor | None, sigma: Tensor, gamma: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The loss, and in the same pass its gradients by score, noise and mirrored."""
    gradients = wanted(score, needs)
    return _lcss(score, noise, None, mirrored, (sigma, gamma, weight), gradients=gradients), *or_absent(gradients, score)


def lcss_loss_seeded(
    score: Tensor, seed: Tensor, mirrored: Tensor | None, sigma: Tensor, gamma: Tensor, weight: Tensor, offset: int
) -> Tensor:
    """See fastdiff_kernels.ops.lcss_loss, for a seed."""
    return _lcss(score, None, seed_beside(seed, score), mirrored, (sigma, gamma, weight), offset)


def lcss_loss_seeded_recorded(
    score: Tensor, seed: Tensor, mirrored: Tensor | None, sigma: Tensor, gamma: Tensor, weight: Tensor, offset: int, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The loss, and in the same pass its gradients by score and mirrored."""
    to_score, to_mirrored = wanted(score, needs)
    loss = _lcss(
        score, None, seed_beside(seed, score), mirrored, (sigma, gamma, weight), offset, (to_score, None, to_mirrored)
    )  # fmt: skip
    return loss, *or_absent((to_score, to_mirrored), score)


@triton.jit(do_not_specialize=["offset"])
def _lcss_gradient_kernel(
    grad, score, mirrored, noise, seed, offset, sigma, gamma, weight, sigma_stride, gamma_stride, weight_stride,
    to_score, to_noise, to_mirrored, elements, blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, blocks, BLOCK, 1)
    index = begin + tl.arange(0, BLOCK)
    mask = index < elements
    at = sample * elements + index
    factor = ratio(tl.load(gamma + sample * gamma_stride), tl.load(sigma + sample * sigma_stride))
    scale = tl.load(grad + sample) * tl.load(weight + sample * weight_stride) * (1.0 if mirrored is None else 0.5)
    s = widen(tl.load(score + at, mask=mask, other=0.0))
    m = None if mirrored is None else widen(tl.load(mirrored + at, mask=mask, other=0.0))
    z = _noise_at(noise, seed, offset, sample, begin, at, mask, BLOCK).to(s.dtype)
    _write_lcss_gradients(s, m, z, factor, scale, to_score, to_noise, to_mirrored, at, mask)


def lcss_loss_backward(
    grad0: Tensor,
    score: Tensor,
    noise: Tensor,
    mirrored: Tensor | None,
    sigma: Tensor,
    gamma: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """With d = 1, or 1/2 beside a mirrored score m: d grad weight (gamma / sigma noise + score), (score - m), (m - gamma / sigma noise)."""
    gradients, constants = wanted(score, needs), (sigma, gamma, weight)
    launch_blocks(
        _lcss_gradient_kernel, score, grad0.contiguous(), score.contiguous(), _dense(mirrored), noise.contiguous(), None, 0,
        *constants, *map(stride, constants), *gradients,
    )  # fmt: skip
    return or_absent(gradients, score)


def lcss_loss_seeded_backward(
    grad0: Tensor,
    score: Tensor,
    seed: Tensor,
    mirrored: Tensor | None,
    sigma: Tensor,
    gamma: Tensor,
    weight: Tensor,
    offset: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """As lcss_loss_backward, with the noise of the seed and none to it."""
    to_score, to_mirrored = wanted(score, needs)
    constants = (sigma, gamma, weight)
    launch_blocks(
        _lcss_gradient_kernel, score, grad0.contiguous(), score.contiguous(), _dense(mirrored), None, seed_beside(seed, score), offset,
        *constants, *map(stride, constants), to_score, None, to_mirrored,
    )  # fmt: skip
    return or_absent((to_score, to_mirrored), score)


@triton.jit
def _write_difference(difference, factor, to_denoised, to_clean, at, mask):
    if to_denoised is not None:
        tl.store(to_denoised + at, factor * difference, mask=mask)
    if to_clean is not None:
        tl.store(to_clean + at, -factor * difference, mask=mask)


@triton.jit
def _denoising_kernel(
    denoised, clean, loss, elements, chunks, divisor, weight, weight_stride, to_denoised, to_clean,
    BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    own_weight = tl.load(weight + sample * weight_stride)
    squares = tl.zeros((BLOCK,), tl.float64 if denoised.dtype.element_ty == tl.float64 else tl.float32)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        error = widen(tl.load(denoised + at, mask=mask, other=0.0)) - widen(tl.load(clean + at, mask=mask, other=0.0))
        squares += error * error
        _write_difference(error, 2.0 * own_weight, to_denoised, to_clean, at, mask)
    tl.store(loss + tl.program_id(0), own_weight.to(tl.float64) * tl.sum(squares).to(tl.float64))


def _denoising(denoised: Tensor, clean: Tensor, weight: Tensor, gradients: Sequence[Tensor | None]) -> Tensor:
    inputs = (denoised.contiguous(), clean.contiguous())
    # As for `registers_for`: in float64 ptxas spills gradients that are written, to fit more programs.
    limit = {"maxnreg": 128} if denoised.dtype == torch.float64 else {}
    (loss,) = sum_samples(_denoising_kernel, inputs, 1, weight, stride(weight), *gradients, num_warps=WARPS, **limit)
    return loss


def denoising_loss(denoised: Tensor, clean: Tensor, weight: Tensor) -> Tensor:
    """See fastdiff_kernels.ops.denoising_loss."""
    return _denoising(denoised, clean, weight, (None, None))


def denoising_loss_recorded(denoised: Tensor, clean: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """The loss, and in the same pass its gradients."""
    gradients = wanted(denoised, needs)
    return _denoising(denoised, clean, weight, gradients), *or_absent(gradients, denoised)


@triton.jit
def _denoising_gradient_kernel(
    grad, denoised, clean, weight, weight_stride, to_denoised, to_clean, elements, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    sample, begin = locate(elements, blocks, BLOCK, 1)
    index = begin + tl.arange(0, BLOCK)
    mask = index < elements
    at = sample * elements + index
    factor = 2.0 * tl.load(grad + sample) * tl.load(weight + sample * weight_stride)
    error = widen(tl.load(denoised + at, mask=mask, other=0.0)) - widen(tl.load(clean + at, mask=mask, other=0.0))
    _write_difference(error, factor, to_denoised, to_clean, at, mask)


def denoising_loss_backward(grad0: Tensor, denoised: Tensor, clean: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """2 grad weight (denoised - clean), and its negative."""
    gradients = wanted(denoised, needs)
    launch_blocks(
        _denoising_gradient_kernel, denoised, grad0.contiguous(), denoised.contiguous(), clean.contiguous(),
        weight, stride(weight), *gradients,
    )  # fmt: skip
    return or_absent(gradients, denoised)
