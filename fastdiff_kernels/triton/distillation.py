"""Losses of SIM and of moment matching on GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import compute_dtype, launch, registers_for, widen
from ._samples import WARPS, launch_blocks, or_absent, stride, wanted
from ._sums import BLOCK, BLOCKS_PER_CHUNK, CHUNK, locate, sum_samples


@triton.jit
def _sim_block(fake, teacher, clean, noisy, skip, out, at, mask):
    """y = fake - teacher and e = fake - sample of a block, the outputs being raw ones where `noisy` is given."""
    f = widen(tl.load(fake + at, mask=mask, other=0.0))
    gap = f - widen(tl.load(teacher + at, mask=mask, other=0.0))
    x = widen(tl.load(clean + at, mask=mask, other=0.0))
    if noisy is not None:
        gap = out * gap
        f = skip * widen(tl.load(noisy + at, mask=mask, other=0.0)) + out * f
    return gap, f - x


@triton.jit
def _finish_sim(squares, products, weight, c, PSEUDO_HUBER: tl.constexpr):
    """A sample's loss, |y| and <y, e> / n in float64, from |y|^2 and <y, e>."""
    projection = products
    if PSEUDO_HUBER:
        norm = tl.sqrt(squares + c * c)
        projection = tl.where(norm == 0.0, 0.0, products / tl.where(norm == 0.0, 1.0, norm))
    return -weight * projection, tl.sqrt(squares), projection


@triton.jit
def _sim_kernel(
    fake, teacher, clean, noisy, skip, out, skip_stride, out_stride, weight, c, weight_stride, c_stride,
    loss, gap, projection, of_chunks, elements, chunks, BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr, PSEUDO_HUBER: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype = tl.float64 if fake.dtype.element_ty == tl.float64 else tl.float32
    own_skip = None if noisy is None else tl.load(skip + sample * skip_stride)
    own_out = None if noisy is None else tl.load(out + sample * out_stride)
    squares = tl.zeros((BLOCK,), dtype)
    products = tl.zeros((BLOCK,), dtype)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        y, e = _sim_block(fake, teacher, clean, noisy, own_skip, own_out, sample * elements + index, mask)
        # The error is not zero beyond the sample's end, but the gap is.
        squares += y * y
        products += y * e
    square = tl.sum(squares).to(tl.float64)
    product = tl.sum(products).to(tl.float64)
    if of_chunks is not None:
        tl.store(of_chunks + 2 * tl.program_id(0), square)
        tl.store(of_chunks + 2 * tl.program_id(0) + 1, product)
    else:
        own_weight = tl.load(weight + sample * weight_stride).to(tl.float64)
        value, length, projected = _finish_sim(square, product, own_weight, tl.load(c + sample * c_stride).to(tl.float64), PSEUDO_HUBER)
        tl.store(loss + sample, value)
        tl.store(gap + sample, length)
        tl.store(projection + sample, projected)


@triton.jit
def _sim_finish_kernel(
    of_chunks, weight, c, weight_stride, c_stride, loss, gap, projection, chunks, WIDTH: tl.constexpr, PSEUDO_HUBER: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((WIDTH,), tl.float64)
    products = tl.zeros((WIDTH,), tl.float64)
    for first in range(0, chunks, WIDTH):
        index = first + tl.arange(0, WIDTH)
        at = 2 * (sample * chunks + index)
        squares += tl.load(of_chunks + at, mask=index < chunks, other=0.0)
        products += tl.load(of_chunks + at + 1, mask=index < chunks, other=0.0)
    own_weight = tl.load(weight + sample * weight_stride).to(tl.float64)
    own_c = tl.load(c + sample * c_stride).to(tl.float64)
    value, length, projected = _finish_sim(tl.sum(squares), tl.sum(products), own_weight, own_c, PSEUDO_HUBER)
    tl.store(loss + sample, value)
    tl.store(gap + sample, length)
    tl.store(projection + sample, projected)


def _preconditioning(noisy: Tensor | None, c_skip: Tensor | None, c_out: Tensor | None) -> tuple[object, ...]:
    if noisy is None or c_skip is None or c_out is None:
        return None, None, None, 0, 0
    return noisy.contiguous(), c_skip, c_out, stride(c_skip), stride(c_out)


def sim_loss(
    fake: Tensor,
    teacher: Tensor,
    sample: Tensor,
    noisy: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    weight: Tensor,
    c: Tensor,
    distance: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fastdiff_kernels.ops.sim_loss; also |y| and <y, e> / n, float64 [B]."""
    batch = fake.shape[0]
    elements = fake.numel() // batch if batch else 0
    chunks = max(1, triton.cdiv(elements, CHUNK))
    loss = fake.new_empty(batch, dtype=compute_dtype(fake))
    gap, projection = (fake.new_empty(batch, dtype=torch.float64) for _ in range(2))
    of_chunks = None if chunks == 1 else fake.new_empty((batch * chunks, 2), dtype=torch.float64)
    pseudo_huber = distance == "pseudo_huber"
    launch(
        _sim_kernel, batch * chunks, fake.contiguous(), teacher.contiguous(), sample.contiguous(),
        *_preconditioning(noisy, c_skip, c_out), weight, c, stride(weight), stride(c), loss, gap, projection, of_chunks,
        elements, chunks, BLOCK=BLOCK, BLOCKS_PER_CHUNK=BLOCKS_PER_CHUNK, PSEUDO_HUBER=pseudo_huber, num_warps=WARPS,
        **registers_for(fake),
    )  # fmt: skip
    if of_chunks is not None:
        launch(
            _sim_finish_kernel, batch, of_chunks, weight, c, stride(weight), stride(c), loss, gap, projection, chunks,
            WIDTH=256, PSEUDO_HUBER=pseudo_huber,
        )  # fmt: skip
    return loss, gap, projection


@triton.jit
def _sim_gradient_kernel(
    grad, fake, teacher, clean, noisy, skip, out, skip_stride, out_stride, weight, c, weight_stride, c_stride, gap, projection,
    to_fake, to_teacher, to_sample, to_noisy, elements, chunks,
    BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr, PSEUDO_HUBER: tl.constexpr,
):  # fmt: skip
    sample, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    dtype = tl.float64 if fake.dtype.element_ty == tl.float64 else tl.float32
    own_skip = None if noisy is None else tl.load(skip + sample * skip_stride)
    own_out = None if noisy is None else tl.load(out + sample * out_stride)
    # What is the same for a whole sample is multiplied in float64, once for a chunk.
    along = tl.load(grad + sample).to(tl.float64) * tl.load(weight + sample * weight_stride).to(tl.float64)
    radial = along * 0.0
    if PSEUDO_HUBER:
        length = tl.load(gap + sample)
        own_c = tl.load(c + sample * c_stride).to(tl.float64)
        squared = length * length + own_c * own_c
        divisor = tl.where(squared == 0.0, 1.0, squared)
        radial = tl.where(squared == 0.0, 0.0, along * tl.load(projection + sample) / divisor)
        along = tl.where(squared == 0.0, 0.0, along / tl.sqrt(divisor))
    of_error = (along if noisy is None else tl.load(out + sample * out_stride) * along).to(dtype)
    of_gap = (radial if noisy is None else tl.load(out + sample * out_stride) * radial).to(dtype)
    of_noisy = None if noisy is None else (-1.0 * tl.load(skip + sample * skip_stride) * along).to(dtype)
    of_sample = along.to(dtype)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = sample * elements + index
        y, e = _sim_block(fake, teacher, clean, noisy, own_skip, own_out, at, mask)
        if to_fake is not None:
            tl.store(to_fake + at, of_gap * y - of_error * (y + e), mask=mask)
        if to_teacher is not None:
            tl.store(to_teacher + at, of_error * e - of_gap * y, mask=mask)
        if to_sample is not None:
            tl.store(to_sample + at, of_sample * y, mask=mask)
        if to_noisy is not None:
            tl.store(to_noisy + at, of_noisy * y, mask=mask)


def sim_loss_backward(
    grad0: Tensor,
    fake: Tensor,
    teacher: Tensor,
    sample: Tensor,
    noisy: Tensor | None,
    c_skip: Tensor | None,
    c_out: Tensor | None,
    weight: Tensor,
    c: Tensor,
    distance: str,
    gap: Tensor,
    projection: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of ops.sim_loss's docstring in one pass: nothing is summed again."""
    gradients = (*wanted(fake, needs[:2]), *wanted(sample, needs[2:]))
    if fake.numel() > 0:
        elements = fake.numel() // fake.shape[0]
        chunks = triton.cdiv(elements, CHUNK)
        launch(
            _sim_gradient_kernel, fake.shape[0] * chunks, grad0.contiguous(), fake.contiguous(), teacher.contiguous(), sample.contiguous(),
            *_preconditioning(noisy, c_skip, c_out), weight, c, stride(weight), stride(c), gap, projection, *gradients, elements, chunks,
            BLOCK=BLOCK, BLOCKS_PER_CHUNK=BLOCKS_PER_CHUNK, PSEUDO_HUBER=distance == "pseudo_huber", num_warps=WARPS,
        )  # fmt: skip
    return or_absent(gradients, fake)


@triton.jit
def _moment_block(sample, auxiliary, teacher, at, mask, AUXILIARY: tl.constexpr):
    """An element's term of the loss, and its derivative in sample (or in auxiliary, for the auxiliary's loss)."""
    x = widen(tl.load(sample + at, mask=mask, other=0.0))
    a = widen(tl.load(auxiliary + at, mask=mask, other=0.0))
    t = widen(tl.load(teacher + at, mask=mask, other=0.0))
    if AUXILIARY:
        return (x - a) * (x - a) + (t - a) * (t - a), 2.0 * ((a - x) + (a - t))
    return x * (a - t), a - t


@triton.jit
def _moment_kernel(
    sample, auxiliary, teacher, loss, elements, chunks, divisor, weight, weight_stride, gradient,
    BLOCK: tl.constexpr, BLOCKS_PER_CHUNK: tl.constexpr, AUXILIARY: tl.constexpr,
):  # fmt: skip
    b, begin = locate(elements, chunks, BLOCK, BLOCKS_PER_CHUNK)
    own_weight = tl.load(weight + b * weight_stride)
    total = tl.zeros((BLOCK,), tl.float64 if sample.dtype.element_ty == tl.float64 else tl.float32)
    for block in tl.static_range(BLOCKS_PER_CHUNK):
        index = begin + block * BLOCK + tl.arange(0, BLOCK)
        mask = index < elements
        at = b * elements + index
        term, derivative = _moment_block(sample, auxiliary, teacher, at, mask, AUXILIARY)
        total += term
        if gradient is not None:
            tl.store(gradient + at, own_weight * derivative, mask=mask)
    tl.store(loss + tl.program_id(0), own_weight.to(tl.float64) * tl.sum(total).to(tl.float64))


@triton.jit
def _moment_gradient_kernel(
    grad, sample, auxiliary, teacher, weight, weight_stride, gradient, elements, blocks, BLOCK: tl.constexpr, AUXILIARY: tl.constexpr
):  # fmt: skip
    b, begin = locate(elements, blocks, BLOCK, 1)
    index = begin + tl.arange(0, BLOCK)
    mask = index < elements
    at = b * elements + index
    _, derivative = _moment_block(sample, auxiliary, teacher, at, mask, AUXILIARY)
    tl.store(gradient + at, tl.load(grad + b) * tl.load(weight + b * weight_stride) * derivative, mask=mask)


def _moment(operands: Sequence[Tensor], weight: Tensor, gradient: Tensor | None, auxiliary: bool) -> Tensor:
    inputs = tuple(x.contiguous() for x in operands)
    (loss,) = sum_samples(_moment_kernel, inputs, 1, weight, stride(weight), gradient, num_warps=WARPS, AUXILIARY=auxiliary)
    return loss


def _moment_recorded(operands: Sequence[Tensor], weight: Tensor, needs: Sequence[bool], auxiliary: bool) -> tuple[Tensor, ...]:
    (gradient,) = wanted(operands[0], needs)
    return _moment(operands, weight, gradient, auxiliary), *or_absent((gradient,), operands[0])


def _moment_backward(grad: Tensor, operands: Sequence[Tensor], weight: Tensor, auxiliary: bool) -> Tensor:
    x = operands[0]
    gradient = x.new_empty(x.shape)
    inputs = (x.contiguous() for x in operands)
    launch_blocks(_moment_gradient_kernel, x, grad.contiguous(), *inputs, weight, stride(weight), gradient, AUXILIARY=auxiliary)
    return gradient


def moment_matching_loss(sample: Tensor, auxiliary: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """See fastdiff_kernels.ops.moment_matching_loss."""
    return _moment((sample, auxiliary, teacher), weight, None, auxiliary=False)


def moment_matching_loss_recorded(
    sample: Tensor, auxiliary: Tensor, teacher: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The loss, and in the same pass weight (auxiliary - teacher)."""
    return _moment_recorded((sample, auxiliary, teacher), weight, needs, auxiliary=False)


def moment_matching_loss_backward(
    grad0: Tensor, sample: Tensor, auxiliary: Tensor, teacher: Tensor, weight: Tensor, needs: Sequence[bool]
) -> Tensor:
    """grad weight (auxiliary - teacher)."""
    return _moment_backward(grad0, (sample, auxiliary, teacher), weight, auxiliary=False)


def moment_matching_auxiliary_loss(sample: Tensor, auxiliary: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """See fastdiff_kernels.ops.moment_matching_auxiliary_loss."""
    return _moment((sample, auxiliary, teacher), weight, None, auxiliary=True)


def moment_matching_auxiliary_loss_recorded(
    sample: Tensor, auxiliary: Tensor, teacher: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The loss, and in the same pass 2 weight (2 auxiliary - sample - teacher)."""
    return _moment_recorded((sample, auxiliary, teacher), weight, needs, auxiliary=True)


def moment_matching_auxiliary_loss_backward(
    grad0: Tensor, sample: Tensor, auxiliary: Tensor, teacher: Tensor, weight: Tensor, needs: Sequence[bool]
) -> Tensor:
    """2 grad weight (2 auxiliary - sample - teacher)."""
    return _moment_backward(grad0, (sample, auxiliary, teacher), weight, auxiliary=True)
