"""Normalisation with scale and shift, and gated residuals: the glue of adaLN transformer blocks (Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import bind
from ._checks import check_choice, check_companion_dtype, check_device, check_like, check_positive, check_tensor

_layer_norm_modulate = bind("layer_norm_modulate")
_rms_norm_modulate = bind("rms_norm_modulate")
_gate_residual = bind("gate_residual")
_gate_residual_norm_modulate = bind("gate_residual_norm_modulate")


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, table: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LN(x) (1 + scale) + shift, with LN(x) = (x - mean(x)) / sqrt(var(x) + eps) over the channels (biased variance, no weights).

    Args:
        x: [B, N, C], float32, bfloat16, float16 or float64; read through its strides on CPU, copied once on GPU where C is not innermost.
        shift, scale: [B, C], [B, 1, C], [B, N, C] or [C], of x's dtype or float32 beside a 16-bit x; read through their strides, so the
            views of one `chunk(6, dim=-1)` cost no copy.
        table: [2, C], added to (shift, scale) before they are used, in float32 (float64 for float64 x): what all samples share, such as
            the rows 0:2 of PixArt's `scale_shift_table` [6, C] (Chen et al., arXiv 2310.00426); dtypes as shift, read through its strides.
        eps: greater than 0.

    Returns:
        [B, N, C] contiguous, x's dtype. Differentiable in x, shift, scale and table; each gradient has its argument's shape and dtype.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "layer_norm_modulate"
    check_tensor(op, "x", x, dims=3)
    _check_modulation(op, "shift", shift, "x", x)
    _check_modulation(op, "scale", scale, "x", x)
    _check_table(op, table, 2, "x", x)
    return _layer_norm_modulate(x, shift, scale, table, check_positive(op, "eps", eps))


def rms_norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    table: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """RMS(x) weight (1 + scale) + shift, with RMS(x) = x / sqrt(mean(x^2) + eps) over the channels (Zhang and Sennrich, arXiv 1910.07467).

    Args:
        x: [B, N, C], float32, bfloat16, float16 or float64; read through its strides on CPU, copied once on GPU where C is not innermost.
        weight: [C], or None for ones; of x's dtype or float32 beside a 16-bit x.
        shift, scale: [B, C], [B, 1, C], [B, N, C] or [C], or None for zeros; dtypes as weight, read through their strides.
        table: [2, C], added to (shift, scale), as in `layer_norm_modulate`.
        eps: greater than 0.

    Returns:
        [B, N, C] contiguous, x's dtype. Differentiable in x, weight, shift, scale and table.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "rms_norm_modulate"
    check_tensor(op, "x", x, dims=3)
    if weight is not None:
        _check_weight(op, weight, x)
    if shift is not None:
        _check_modulation(op, "shift", shift, "x", x)
    if scale is not None:
        _check_modulation(op, "scale", scale, "x", x)
    _check_table(op, table, 2, "x", x)
    return _rms_norm_modulate(x, weight, shift, scale, table, check_positive(op, "eps", eps))


def gate_residual(residual: Tensor, branch: Tensor, gate: Tensor, *, table: Tensor | None = None) -> Tensor:
    """residual + gate * branch.

    Args:
        residual: [B, N, C], float32, bfloat16, float16 or float64; layouts as x of `layer_norm_modulate`.
        branch: like residual.
        gate: [B, C], [B, 1, C], [B, N, C] or [C], of residual's dtype or float32 beside a 16-bit residual; read through its strides.
        table: [C] or [1, C], added to the gate, as in `layer_norm_modulate`.

    Returns:
        [B, N, C] contiguous, residual's dtype. Differentiable in every tensor.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "gate_residual"
    _check_branch(op, residual, branch)
    _check_modulation(op, "gate", gate, "residual", residual)
    _check_table(op, table, 1, "residual", residual)
    return _gate_residual(residual, branch, gate, table)


def gate_residual_norm_modulate(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    *,
    table: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """h = residual + gate * branch and norm(h) (1 + scale) + shift, in one pass: the seam between two adaLN sub-blocks.

    The norm is taken of h before h is rounded to its dtype.

    Args:
        residual, branch, gate: as in `gate_residual`; gate None is 1, as after the cross-attention of PixArt.
        shift, scale: as gate.
        table: [3, C], added to (gate, shift, scale), as in `layer_norm_modulate` (rows 2:5 of PixArt's); with no gate [2, C].
        norm: "layer" as in `layer_norm_modulate`, or "rms" as in `rms_norm_modulate` without weight.
        eps: greater than 0.

    Returns:
        (h, modulated), both [B, N, C] contiguous in residual's dtype. Differentiable in every tensor.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "gate_residual_norm_modulate"
    _check_branch(op, residual, branch)
    if gate is not None:
        _check_modulation(op, "gate", gate, "residual", residual)
    _check_modulation(op, "shift", shift, "residual", residual)
    _check_modulation(op, "scale", scale, "residual", residual)
    _check_table(op, table, 2 if gate is None else 3, "residual", residual)
    check_choice(op, "norm", norm, ("layer", "rms"))
    return _gate_residual_norm_modulate(residual, branch, gate, shift, scale, table, norm, check_positive(op, "eps", eps))


def _check_branch(op: str, residual: Tensor, branch: Tensor) -> None:
    check_tensor(op, "residual", residual, dims=3)
    check_like(op, "branch", branch, "residual", residual)


def _check_table(op: str, table: Tensor | None, rows: int, like_name: str, like: Tensor) -> None:
    if table is None:
        return
    check_tensor(op, "table", table)
    channels = like.shape[2]
    if table.shape != (rows, channels) and not (rows == 1 and table.shape == (channels,)):
        allowed = f"({channels},) or (1, {channels})" if rows == 1 else f"({rows}, {channels})"
        raise ValueError(f"{op}: table must have shape {allowed} beside {like_name}; got {tuple(table.shape)}")
    check_companion_dtype(op, "table", table, like_name, like)
    check_device(op, "table", table, like_name, like)


def _check_modulation(op: str, name: str, modulation: Tensor, like_name: str, like: Tensor) -> None:
    check_tensor(op, name, modulation)
    batch, tokens, channels = like.shape
    allowed = ((batch, channels), (batch, 1, channels), (batch, tokens, channels), (channels,))
    if modulation.shape not in allowed:
        shapes = ", ".join(map(str, allowed[:3])) + f" or {allowed[3]}"
        raise ValueError(f"{op}: {name} must have shape {shapes} beside {like_name}; got {tuple(modulation.shape)}")
    check_companion_dtype(op, name, modulation, like_name, like)
    check_device(op, name, modulation, like_name, like)


def _check_weight(op: str, weight: Tensor, x: Tensor) -> None:
    check_tensor(op, "weight", weight)
    if weight.shape != x.shape[2:]:
        raise ValueError(f"{op}: weight must have shape {tuple(x.shape[2:])}; got {tuple(weight.shape)}")
    check_companion_dtype(op, "weight", weight, "x", x)
    check_device(op, "weight", weight, "x", x)
