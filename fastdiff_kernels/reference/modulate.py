"""Definitions: normalisation with scale and shift, gated residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype


def _rows(modulation: Tensor, x: Tensor) -> Tensor:
    """[C], [B, C], [B, 1, C] or [B, N, C] as a tensor that broadcasts against x [B, N, C], in its compute dtype."""
    modulation = modulation.to(compute_dtype(x))
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def _normalise(x: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LN(x) (1 + scale) + shift over the last dimension of x [B, N, C]."""
    normal = _normalise(x.to(compute_dtype(x)), "layer", eps)
    return (normal * (1 + _rows(scale, x)) + _rows(shift, x)).to(x.dtype)


def rms_norm_modulate(
    x: Tensor, weight: Tensor | None = None, shift: Tensor | None = None, scale: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """RMS(x) weight (1 + scale) + shift over the last dimension of x [B, N, C]."""
    y = _normalise(x.to(compute_dtype(x)), "rms", eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if scale is not None:
        y = y * (1 + _rows(scale, x))
    if shift is not None:
        y = y + _rows(shift, x)
    return y.to(x.dtype)


def gate_residual(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """residual + gate * branch, all [B, N, C]."""
    dtype = compute_dtype(residual)
    return (residual.to(dtype) + _rows(gate, residual) * branch.to(dtype)).to(residual.dtype)


def gate_residual_norm_modulate(
    residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, norm: str = "layer", eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """h = residual + gate * branch; (h, norm(h) (1 + scale) + shift), the norm taken of h before it is rounded."""
    dtype = compute_dtype(residual)
    h = residual.to(dtype) + _rows(gate, residual) * branch.to(dtype)
    modulated = _normalise(h, norm, eps) * (1 + _rows(scale, residual)) + _rows(shift, residual)
    return h.to(residual.dtype), modulated.to(residual.dtype)
