"""adaLN glue on GPU: one kernel forward and one backward for all four ops, told apart by which operands are None.

A program takes a few rows of one sample, so that modulation shared by the sample's rows is read once, and its gradient is summed over
those rows in registers; `_add_blocks` then adds what the programs left, in their order. No result depends on the batch or on timing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import absent, compute_dtype, launch, widen

# Rows whose partial sums `_add_blocks` adds in one program.
_CHUNK = 256


@triton.jit
def _row(pointer, strides, b, n, columns, mask, otherwise: tl.constexpr):
    """The row of an operand at token n of sample b, widened; `otherwise` where the operand is None."""
    if pointer is None:
        row = otherwise
    else:
        row = widen(tl.load(pointer + b * strides[0] + n * strides[1] + columns * strides[2], mask=mask, other=0.0))
    return row


@triton.jit
def _factor(weight, scale, weight_strides, scale_strides, b, n, columns, mask):
    """weight (1 + scale)."""
    return _row(weight, weight_strides, b, n, columns, mask, 1.0) * (1.0 + _row(scale, scale_strides, b, n, columns, mask, 0.0))


@triton.jit
def _normalise(h, mask, channels, EPS: tl.constexpr, CENTRED: tl.constexpr):
    """The row normalised, zero beyond its end, and its inverse deviation."""
    if CENTRED:
        h = tl.where(mask, h - tl.sum(h, 0) / channels, 0.0)
    inverse_deviation = tl.rsqrt(tl.sum(h * h, 0) / channels + EPS)
    return h * inverse_deviation, inverse_deviation


@triton.jit
def _forward_kernel(
    x, branch, gate, weight, shift, scale, hidden_out, modulated_out,
    x_strides, branch_strides, gate_strides, weight_strides, shift_strides, scale_strides,
    tokens, channels,
    EPS: tl.constexpr, CENTRED: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tokens, ROWS)
    b = program // blocks
    first = program % blocks * ROWS
    columns = tl.arange(0, BLOCK)
    mask = columns < channels
    if SHARED:
        gates = _row(gate, gate_strides, b, first, columns, mask, 0.0)
        factors = _factor(weight, scale, weight_strides, scale_strides, b, first, columns, mask)
        shifts = _row(shift, shift_strides, b, first, columns, mask, 0.0)
    for n in range(first, tl.minimum(first + ROWS, tokens)):
        at = (b * tokens + n) * channels + columns
        h = _row(x, x_strides, b, n, columns, mask, 0.0)
        if not SHARED:
            gates = _row(gate, gate_strides, b, n, columns, mask, 0.0)
            factors = _factor(weight, scale, weight_strides, scale_strides, b, n, columns, mask)
            shifts = _row(shift, shift_strides, b, n, columns, mask, 0.0)
        if branch is not None:
            h += gates * _row(branch, branch_strides, b, n, columns, mask, 0.0)
            tl.store(hidden_out + at, h, mask=mask)
        if modulated_out is not None:
            normal, _ = _normalise(h, mask, channels, EPS, CENTRED)
            tl.store(modulated_out + at, normal * factors + shifts, mask=mask)


@triton.jit
def _put(pointer, sums, value, at, mask, SUM: tl.constexpr):
    """A row's share of a modulation gradient: added to the program's sums, or written where each row has a gradient of its own."""
    if pointer is not None:
        if SUM:
            sums += value
        else:
            tl.store(pointer + at, value, mask=mask)
    return sums


@triton.jit
def _put_sums(pointer, sums, program, channels, columns, mask, SUM: tl.constexpr):
    if pointer is not None and SUM:
        tl.store(pointer + program * channels + columns, sums, mask=mask)


@triton.jit
def _backward_kernel(
    grad_hidden, grad_modulated, x, branch, gate, weight, scale,
    grad_x, grad_branch, grad_gate, grad_weight, grad_shift, grad_scale,
    grad_hidden_strides, grad_modulated_strides, x_strides, branch_strides, gate_strides, weight_strides, scale_strides,
    tokens, channels,
    EPS: tl.constexpr, CENTRED: tl.constexpr, SUM_GATE: tl.constexpr, SUM_SHIFT: tl.constexpr, SUM_SCALE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tokens, ROWS)
    b = program // blocks
    first = program % blocks * ROWS
    columns = tl.arange(0, BLOCK)
    mask = columns < channels
    gate_sums = tl.zeros([BLOCK], ACCUMULATOR)
    weight_sums = tl.zeros([BLOCK], ACCUMULATOR)
    shift_sums = tl.zeros([BLOCK], ACCUMULATOR)
    scale_sums = tl.zeros([BLOCK], ACCUMULATOR)
    for n in range(first, tl.minimum(first + ROWS, tokens)):
        at = (b * tokens + n) * channels + columns
        if grad_modulated is not None:
            h = _row(x, x_strides, b, n, columns, mask, 0.0)
            if branch is not None:
                h += _row(gate, gate_strides, b, n, columns, mask, 0.0) * _row(branch, branch_strides, b, n, columns, mask, 0.0)
            normal, inverse_deviation = _normalise(h, mask, channels, EPS, CENTRED)
            upstream = _row(grad_modulated, grad_modulated_strides, b, n, columns, mask, 0.0)
            shift_sums = _put(grad_shift, shift_sums, upstream, at, mask, SUM_SHIFT)
            weights = _row(weight, weight_strides, b, n, columns, mask, 1.0)
            scale_sums = _put(grad_scale, scale_sums, upstream * normal * weights, at, mask, SUM_SCALE)
            upstream *= 1.0 + _row(scale, scale_strides, b, n, columns, mask, 0.0)
            weight_sums = _put(grad_weight, weight_sums, upstream * normal, at, mask, True)
            upstream *= weights
            along = tl.sum(upstream * normal, 0) / channels
            constant = tl.sum(upstream, 0) / channels if CENTRED else 0.0
            grad = inverse_deviation * (upstream - constant - normal * along)
            # Loaded late, as gate and branch are once more below, to keep fewer rows in registers.
            grad += _row(grad_hidden, grad_hidden_strides, b, n, columns, mask, 0.0)
        else:
            grad = _row(grad_hidden, grad_hidden_strides, b, n, columns, mask, 0.0)
        if grad_x is not None:
            tl.store(grad_x + at, grad, mask=mask)
        if grad_branch is not None:
            tl.store(grad_branch + at, grad * _row(gate, gate_strides, b, n, columns, mask, 0.0), mask=mask)
        if grad_gate is not None:
            branches = _row(branch, branch_strides, b, n, columns, mask, 0.0)
            gate_sums = _put(grad_gate, gate_sums, grad * branches, at, mask, SUM_GATE)
    _put_sums(grad_gate, gate_sums, program, channels, columns, mask, SUM_GATE)
    _put_sums(grad_weight, weight_sums, program, channels, columns, mask, True)
    _put_sums(grad_shift, shift_sums, program, channels, columns, mask, SUM_SHIFT)
    _put_sums(grad_scale, scale_sums, program, channels, columns, mask, SUM_SCALE)


@triton.jit
def _add_blocks(partial, out, rows, channels, CHUNK: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
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


def _rows_per_program(tokens: int) -> int:
    # It depends on neither batch nor GPU, so that sums over a sample's rows do not: enough programs for one sample of a few hundred tokens
    # to occupy a good part of a GPU, against partial sums that cost a fraction 1 / rows of the traffic.
    return 8 if tokens <= 256 else 16


def _block(channels: int) -> int:
    return triton.next_power_of_2(channels)


def _warps(block: int) -> int:
    # 8 elements a thread, of which a row's operands all stay in registers.
    return max(1, min(16, block // 256))


def _unit_stride(x: Tensor | None) -> Tensor | None:
    """x itself, or a copy whose channels are innermost."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _strides(operand: Tensor | None, tokens: int) -> tuple[int, int, int]:
    """Distances from one sample, token and channel to the next, in an operand [B, N, C], [B, 1, C], [B, C] or [C]."""
    if operand is None:
        return 0, 0, 0
    return (
        operand.stride(0) if operand.dim() > 1 else 0,
        operand.stride(1) if operand.dim() == 3 and operand.shape[1] == tokens else 0,
        operand.stride(-1),
    )


def _shared(operand: Tensor | None, tokens: int) -> bool:
    """Whether a sample's rows share the operand's row."""
    return operand is None or operand.dim() < 3 or operand.shape[1] != tokens


def _forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, weight: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    norm: str | None, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """x + gate * branch where there is a branch, and the modulated norm where there is one."""
    batch, tokens, channels = x.shape
    hidden = None if branch is None else x.new_empty(x.shape)
    modulated = None if norm is None else x.new_empty(x.shape)
    outputs = tuple(out for out in (hidden, modulated) if out is not None)
    if x.numel() == 0:
        return outputs
    operands = (_unit_stride(x), _unit_stride(branch), gate, weight, shift, scale)
    rows, block = _rows_per_program(tokens), _block(channels)
    launch(
        _forward_kernel, batch * triton.cdiv(tokens, rows), *operands, hidden, modulated,
        *(_strides(o, tokens) for o in operands), tokens, channels,
        EPS=eps, CENTRED=norm == "layer", SHARED=all(_shared(o, tokens) for o in (gate, shift, scale)), ROWS=rows, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return outputs


def _backward(
    grad_hidden: Tensor | None, grad_modulated: Tensor | None,
    x: Tensor, branch: Tensor | None, gate: Tensor | None, weight: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    norm: str | None, eps: float, needs: dict[str, bool],
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients by argument, those that are not needed left out."""
    batch, tokens, channels = x.shape
    rows, block = _rows_per_program(tokens), _block(channels)
    programs = batch * triton.cdiv(tokens, rows)
    named = {"x": x, "branch": branch, "gate": gate, "weight": weight, "shift": shift, "scale": scale}
    arguments = {name: argument for name, argument in named.items() if argument is not None}
    summed = {name for name, argument in arguments.items() if _shared(argument, tokens)} - {"x", "branch"} | {"weight"}
    # Where the kernel writes: the gradient itself, or partial sums of it.
    written = {
        name: x.new_empty((programs, channels), dtype=compute_dtype(x)) if name in summed else argument.new_empty(argument.shape)
        for name, argument in arguments.items()
        if needs.get(name)
    }
    if x.numel():
        operands = (_unit_stride(grad_hidden), _unit_stride(grad_modulated), _unit_stride(x), _unit_stride(branch), gate, weight, scale)
        launch(
            _backward_kernel, programs, *operands, *(written.get(n) for n in ("x", "branch", "gate", "weight", "shift", "scale")),
            *(_strides(o, tokens) for o in operands), tokens, channels,
            EPS=eps, CENTRED=norm == "layer", SUM_GATE="gate" in summed, SUM_SHIFT="shift" in summed, SUM_SCALE="scale" in summed,
            ROWS=rows, BLOCK=block, ACCUMULATOR=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=_warps(block),
        )  # fmt: skip
    return {name: _total(out, arguments[name]) if name in summed else out for name, out in written.items()}


def _total(partial: Tensor, argument: Tensor) -> Tensor:
    """The gradient of an argument from partial sums [programs, C], which are added by sample or over all samples."""
    groups = argument.shape[0] if argument.dim() > 1 else 1
    channels = partial.shape[1]
    if partial.numel() == 0:
        return argument.new_zeros(argument.shape)
    rows = partial.shape[0] // groups
    while True:
        chunks = triton.cdiv(rows, _CHUNK)
        out = argument.new_empty(argument.shape) if chunks == 1 else partial.new_empty((groups * chunks, channels))
        launch(_add_blocks, groups * chunks * triton.cdiv(channels, 64), partial, out, rows, channels, CHUNK=_CHUNK, WIDTH=64, DEPTH=16)
        if chunks == 1:
            return out
        partial, rows = out, chunks


def _in_order(grads: dict[str, Tensor], like: Tensor, names: Sequence[str]) -> tuple[Tensor, ...]:
    return tuple(grads.get(name, absent(like)) for name in names)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return _forward(x, None, None, None, shift, scale, "layer", eps)[0]


def layer_norm_modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    names = ("x", "shift", "scale")
    wanted = dict(zip(names, needs, strict=True))
    return _in_order(_backward(None, grad, x, None, None, None, shift, scale, "layer", eps, wanted), x, names)


def rms_norm_modulate(x: Tensor, weight: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    return _forward(x, None, None, weight, shift, scale, "rms", eps)[0]


def rms_norm_modulate_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    names = ("x", "weight", "shift", "scale")
    wanted = dict(zip(names, needs, strict=True))
    return _in_order(_backward(None, grad, x, None, None, weight, shift, scale, "rms", eps, wanted), x, names)


def gate_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return _forward(residual, branch, gate, None, None, None, None, 0.0)[0]


def gate_residual_backward(grad: Tensor, residual: Tensor, branch: Tensor, gate: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    names = ("x", "branch", "gate")
    wanted = dict(zip(names, needs, strict=True))
    return _in_order(_backward(grad, None, residual, branch, gate, None, None, None, None, 0.0, wanted), residual, names)


def gate_residual_norm_modulate(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, modulated = _forward(residual, branch, gate, None, shift, scale, norm, eps)
    return hidden, modulated


def gate_residual_norm_modulate_backward(
    grad_hidden: Tensor, grad_modulated: Tensor, residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: str,
    eps: float, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    names = ("x", "branch", "gate", "shift", "scale")
    wanted = dict(zip(names, needs, strict=True))
    grads = _backward(grad_hidden, grad_modulated, residual, branch, gate, None, shift, scale, norm, eps, wanted)
    return _in_order(grads, residual, names)
