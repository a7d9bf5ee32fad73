"""adaLN glue on GPU: launchers of the kernels in _modulate_kernels.py.

Rows are independent in the forward pass. In the backward pass a program takes rows of one sample and sums over them in registers what is
shared; `add_rows` then adds what the programs left, in their order. No result depends on the batch or on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import absent, capability, compute_dtype, launch
from ._modulate_kernels import _backward_kernel, _forward_kernel
from ._sums import add_rows
from ._tuned import tuned

# Channels beyond which a thread of the backward pass takes twice as many, with no registers left for the next row.
_WIDE = 4096


class Tile(NamedTuple):
    """What a program holds at a time: `rows` rows in chunks of `chunk` columns."""

    rows: int
    chunk: int
    warps: int


def _tile(channels: int, itemsize: int, elements: int, vectors: Sequence[int], min_warps: int) -> Tile:
    """As few threads for a row as hold at most `elements` elements each, and as many rows as fill the warps.

    Of the vectors, widths in bytes of a thread's loads, the one that leaves the fewest lanes idle, the first for equals.
    """
    candidates = []
    for vector in (size // itemsize for size in vectors):
        threads = 1
        while triton.cdiv(channels, threads * vector) * vector > elements:
            threads *= 2
        candidates.append((triton.cdiv(channels, threads * vector) * threads * vector, threads, threads * vector))
    _, threads, chunk = min(candidates, key=lambda c: c[0])
    warps = max(min_warps, threads // 32)
    return Tile(rows=32 * warps // threads, chunk=chunk, warps=warps)


def _forward_tile(channels: int, dtype: torch.dtype) -> Tile:
    # A row that stays within a warp is summed by shuffles alone, with no barrier; 40 elements a thread leave room for 24 such rows and more
    # on a multiprocessor, twice the bytes under way that its share of the memory's bandwidth needs.
    return _tile(channels, dtype.itemsize, 20 if dtype == torch.float64 else 40, (16,), 4)


def _backward_tile(channels: int, dtype: torch.dtype) -> Tile:
    # A thread also holds sums over rows, up to three for each element, and the next row. Its warps share few rows or one, so that few of
    # these sums are held twice and have to be added in the end. Wide rows need all registers: a thread of 8 warps has twice those of 16.
    if channels > _WIDE:
        return _tile(channels, dtype.itemsize, 16 if dtype == torch.float64 else 32, (16,), 8)
    # Beside the next row, 16 elements take 250 registers, 12 no more than 168.
    most = 16 if _fills_registers(channels) else 12
    return _tile(channels, dtype.itemsize, most // 2 if dtype == torch.float64 else most, (16, 8), 2)


def _most_registers(channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """A limit for the forward pass, where the assembler left to itself spills a little to have one program more on a multiprocessor."""
    if dtype == torch.float64:
        return {"maxnreg": 255}
    if dtype.itemsize == 2 and 5120 < channels <= 6144:
        return {"maxnreg": 80 if channels % 16 == 0 else 128}
    return {}


def _fills_registers(channels: int) -> bool:
    """Whether the backward pass has no registers left for the next row."""
    return channels > 1536


def _sums_at_once(channels: int, dtype: torch.dtype, weight: bool) -> int:
    """How many sums over rows the registers hold, beside a weight or not; those of wide rows that they do not hold take further passes."""
    if (dtype == torch.float64 and channels > 2048) or (dtype.itemsize >= 4 and channels > 6144):
        return 1
    # Rows of lengths that are not divisible by 16 take more registers for their addresses.
    return 2 if channels > _WIDE and (dtype.itemsize >= 4 or weight or channels % 16 or channels > 6144) else 4


def _rows_per_program(tokens: int) -> int:
    # It depends on neither batch nor GPU, so that sums over a sample's rows do not: enough programs for one sample of a few hundred tokens
    # to occupy a good part of a GPU, against partial sums that cost a fraction 1 / rows of the traffic.
    return min(triton.next_power_of_2(tokens), 8 if tokens <= 256 else 16 if tokens <= 2048 else 32)


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


def _table_strides(table: Tensor | None) -> tuple[int, int]:
    """Distances from one row and one channel to the next, in a table [rows, C] or [C]."""
    return (0, 0) if table is None else (table.stride(0) if table.dim() > 1 else 0, table.stride(-1))


def _by_row(argument: Tensor, tokens: int) -> bool:
    """Whether a modulation argument has a row for each row of x."""
    return argument.dim() == 3 and argument.shape[1] == tokens


def _accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


class Call(NamedTuple):
    """The arguments of all four ops."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None
    weight: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    table: Tensor | None = None
    norm: str | None = None
    eps: float = 0.0

    @property
    def in_table(self) -> list[str]:
        """The arguments to which the table's rows are added, in their order."""
        gated = ["gate"] if self.gate is not None else []
        return gated + ["shift", "scale"] if self.norm else gated


def _whole_rows(call: Call) -> Call:
    """The call with a table whose channels are innermost: a copy of three rows costs less than registers for their strides."""
    return call._replace(table=_unit_stride(call.table))


def _forward(call: Call) -> tuple[Tensor, ...]:
    """x + gate * branch where there is a branch, and the modulated norm where there is one."""
    call = _whole_rows(call)
    x, tokens = call.x, call.x.shape[1]
    rows, channels = x.shape[0] * tokens, x.shape[2]
    hidden = None if call.branch is None else x.new_empty(x.shape)
    modulated = None if call.norm is None else x.new_empty(x.shape)
    outputs = tuple(out for out in (hidden, modulated) if out is not None)
    if x.numel() == 0:
        return outputs
    operands = (_unit_stride(x), _unit_stride(call.branch), call.gate, call.weight, call.shift, call.scale)
    tile = tuned("modulate forward", capability(x), x.dtype, channels, _forward_tile(channels, x.dtype))
    launch(
        _forward_kernel, triton.cdiv(rows, tile.rows), *operands, call.table, hidden, modulated,
        *(_strides(o, tokens) for o in operands), _table_strides(call.table), rows, tokens,
        CHANNELS=channels, EPS=call.eps, CENTRED=call.norm == "layer", FIRST=len(call.in_table) % 2,
        ROWS=tile.rows, CHUNK=tile.chunk, INDEX=tl.int32 if rows + tile.rows < 2**31 else tl.int64,
        num_warps=tile.warps, **_most_registers(channels, x.dtype),
    )  # fmt: skip
    return outputs


def _backward(call: Call, grad_hidden: Tensor | None, grad_modulated: Tensor | None, needs: dict[str, bool]) -> dict[str, Tensor]:
    """Gradients by argument, those that are not needed left out."""
    x, (batch, tokens, channels) = call.x, call.x.shape
    wanted = {name: argument for name, argument in call._asdict().items() if needs.get(name) and isinstance(argument, Tensor)}
    grads = {name: argument.new_empty(argument.shape) for name, argument in wanted.items()}
    if x.numel() == 0 or (grad_hidden is None and grad_modulated is None):
        return {name: grad.zero_() for name, grad in grads.items()}
    by_row = {name for name in ("gate", "shift", "scale") if name in wanted and _by_row(wanted[name], tokens)}
    if grad_modulated is None:
        for name in by_row - {"gate"}:
            grads[name].zero_()
    shared = [name for name in ("gate", "shift", "scale", "weight") if name in wanted and name not in by_row]
    table = dict(zip(call.in_table, grads["table"].view(-1, channels), strict=True)) if "table" in grads else {}
    slots = {name: i for i, name in enumerate(dict.fromkeys([*table, *shared]))}
    rows = _rows_per_program(tokens)
    programs = batch * triton.cdiv(tokens, rows)
    partial = x.new_empty((len(slots), programs, channels), dtype=compute_dtype(x)) if slots else None
    tile = tuned("modulate backward", capability(x), x.dtype, channels, _backward_tile(channels, x.dtype))
    operands = (*map(_unit_stride, (grad_hidden, grad_modulated, x, call.branch)), call.gate, call.weight, call.scale)
    into = [grads.get(name) if name in ("x", "branch") or name in by_row else None for name in ("x", "branch", "gate", "shift", "scale")]
    call = _whole_rows(call)
    at_once = _sums_at_once(channels, x.dtype, "weight" in slots)
    alone = "x" not in wanted and "branch" not in wanted and _fills_registers(channels)
    limit: dict[str, Any] = {}
    if channels > _WIDE or alone:
        # As in the forward pass: the widest rows fill what one program can have, and sums alone spill a little before they do.
        limit = {"maxnreg": min(255, 2048 // tile.warps)}
    elif channels <= 128:
        # Rows of few threads hold the sums of several rows.
        limit = {"maxnreg": 255 if x.dtype == torch.float64 else 168}
    names = list(slots)
    for i in range(0, max(len(names), 1), at_once):
        summed = {name: slots[name] for name in names[i : i + at_once]}
        launch(
            _backward_kernel, programs, *operands, call.table, *(into if i == 0 else [None] * len(into)), partial,
            *(_strides(o, tokens) for o in operands), _table_strides(call.table), tokens, programs,
            CHANNELS=channels, EPS=call.eps, CENTRED=call.norm == "layer", FIRST=len(call.in_table) % 2,
            GATE=summed.get("gate", -1), WEIGHT=summed.get("weight", -1), SHIFT=summed.get("shift", -1), SCALE=summed.get("scale", -1),
            ROWS_PER_PROGRAM=rows, ROWS=min(tile.rows, rows), CHUNK=tile.chunk, ACCUMULATOR=_accumulator(x),
            WIDE=_fills_registers(channels), num_warps=tile.warps, **limit,
        )  # fmt: skip
    if partial is not None:
        by_sample = [name for name in shared if wanted[name].dim() > 1]
        over_all = [(slots[name], grads[name]) for name in shared if wanted[name].dim() == 1]
        over_all += [(slots[name], row) for name, row in table.items()]
        add_rows([partial[slots[name]] for name in by_sample], batch, [grads[name] for name in by_sample])
        add_rows([partial[slot] for slot, _ in over_all], 1, [out for _, out in over_all])
    return grads


def _gradients(
    call: Call, grad_hidden: Tensor | None, grad_modulated: Tensor | None, names: Sequence[str], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    grads = _backward(call, grad_hidden, grad_modulated, dict(zip(names, needs, strict=True)))
    return tuple(grads.get(name, absent(call.x)) for name in names)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, table: Tensor | None, eps: float) -> Tensor:
    return _forward(Call(x, shift=shift, scale=scale, table=table, norm="layer", eps=eps))[0]


def layer_norm_modulate_backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, table: Tensor | None, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    call = Call(x, shift=shift, scale=scale, table=table, norm="layer", eps=eps)
    return _gradients(call, None, grad, ("x", "shift", "scale", "table"), needs)


def rms_norm_modulate(
    x: Tensor, weight: Tensor | None, shift: Tensor | None, scale: Tensor | None, table: Tensor | None, eps: float
) -> Tensor:
    return _forward(Call(x, weight=weight, shift=shift, scale=scale, table=table, norm="rms", eps=eps))[0]


def rms_norm_modulate_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, shift: Tensor | None, scale: Tensor | None, table: Tensor | None, eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    call = Call(x, weight=weight, shift=shift, scale=scale, table=table, norm="rms", eps=eps)
    return _gradients(call, None, grad, ("x", "weight", "shift", "scale", "table"), needs)


def gate_residual(residual: Tensor, branch: Tensor, gate: Tensor, table: Tensor | None) -> Tensor:
    return _forward(Call(residual, branch, gate, table=table))[0]


def gate_residual_backward(
    grad: Tensor, residual: Tensor, branch: Tensor, gate: Tensor, table: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return _gradients(Call(residual, branch, gate, table=table), grad, None, ("x", "branch", "gate", "table"), needs)


def gate_residual_norm_modulate(
    residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, table: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor]:
    hidden, modulated = _forward(Call(residual, branch, gate, None, shift, scale, table, norm, eps))
    return hidden, modulated


def gate_residual_norm_modulate_backward(
    grad_hidden: Tensor | None, grad_modulated: Tensor | None, residual: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor,
    scale: Tensor, table: Tensor | None, norm: str, eps: float, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    call = Call(residual, branch, gate, None, shift, scale, table, norm, eps)
    return _gradients(call, grad_hidden, grad_modulated, ("x", "branch", "gate", "shift", "scale", "table"), needs)
