"""Definitions: normalisation with scale and shift, gated residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype


def _rows(modulation: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """[C], [B, C], [B, 1, C] or [B, N, C] plus bias [C], as a tensor that broadcasts against x [B, N, C], in its compute dtype."""
    modulation = modulation.to(compute_dtype(x))
    modulation = modulation.unsqueeze(1) if modulation.dim() == 2 else modulation
    return modulation if bias is None else modulation + bias


def _biases(table: Tensor | None, x: Tensor, count: int) -> tuple[Tensor | None, ...]:
    """The table's rows in x's compute dtype."""
    return (None,) * count if table is None else table.to(compute_dtype(x)).reshape(count, x.shape[-1]).unbind()


def _normalise(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, table: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LN(x) (1 + scale) + shift over the last dimension of x [B, N, C]; table [2, C] is added to (shift, scale)."""
    shift_bias, scale_bias = _biases(table, x, 2)
    normal = _normalise(x.to(compute_dtype(x)), "layer", eps)
    return (normal * (1 + _rows(scale, x, scale_bias)) + _rows(shift, x, shift_bias)).to(x.dtype)


def rms_norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    table: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """RMS(x) weight (1 + scale) + shift over the last dimension of x [B, N, C]; table [2, C] is added to (shift, scale)."""
    shift_bias, scale_bias = _biases(table, x, 2)
    y = _normalise(x.to(compute_dtype(x)), "rms", eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    factor = scale_bias if scale is None else _rows(scale, x, scale_bias)
    if factor is not None:
        y = y * (1 + factor)
    offset = shift_bias if shift is None else _rows(shift, x, shift_bias)
    if offset is not None:
        y = y + offset
    return y.to(x.dtype)


def gate_residual(residual: Tensor, branch: Tensor, gate: Tensor, table: Tensor | None = None) -> Tensor:
    """residual + gate * branch, all [B, N, C]; table [C] or [1, C] is added to the gate."""
    dtype = compute_dtype(residual)
    (bias,) = _biases(table, residual, 1)
    return (residual.to(dtype) + _rows(gate, residual, bias) * branch.to(dtype)).to(residual.dtype)


def gate_residual_norm_modulate(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    table: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """h = residual + gate * branch; (h, norm(h) (1 + scale) + shift), the norm taken of h before it is rounded.

    table [3, C] is added to (gate, shift, scale); without a gate, which then is 1, table [2, C] to (shift, scale).
    """
    dtype = compute_dtype(residual)
    branch = branch.to(dtype)
    *gate_bias, shift_bias, scale_bias = _biases(table, residual, 2 if gate is None else 3)
    h = residual.to(dtype) + (branch if gate is None else _rows(gate, residual, gate_bias[0]) * branch)
    modulated = _normalise(h, norm, eps) * (1 + _rows(scale, residual, scale_bias)) + _rows(shift, residual, shift_bias)
    return h.to(residual.dtype), modulated.to(residual.dtype)
