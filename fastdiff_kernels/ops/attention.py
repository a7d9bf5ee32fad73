"""Softmax attention over whole sequences (Vaswani et al., arXiv 1706.03762), with keys that may end early."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dispatch import bind
from ._checks import check_device, check_like, check_tensor

_attention = bind("attention")
_attention_packed = bind("attention_packed")
_attention_dual = bind("attention_dual")

MAX_HEAD_DIM = 256


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, key_lengths: Tensor | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v for each head, without a causal mask.

    Args:
        q: [B, N, H, D], float32, bfloat16, float16 or float64, any strides (the parts of one packed projection are read in place;
            on GPU, rows that do not begin and end at multiples of 16 bytes are copied); D from 1 to 256, any value.
        k, v: [B, M, H, D], q's dtype, any strides.
        scale: finite; None means 1 / sqrt(D).
        key_lengths: [B], int32 or int64. Sample b attends to its first key_lengths[b] keys alone, the number clamped to [0, M]; what
            stands behind them, NaN included, has no influence and gets a gradient of zero. A sample without keys returns zeros.
        return_lse: whether to return log sum exp(scale q k^T) over the keys as well, with which attention to parts of the keys is
            merged (Rabe and Staats, arXiv 2112.05682).

    Returns:
        [B, N, H, D] contiguous, q's dtype; with return_lse also [B, H, N], float32 (float64 beside float64), minus infinity where
        there is no key. Both are differentiable in q, k and v; the backward pass is deterministic.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "attention"
    _check(op, q, k, v, key_lengths)
    output, lse = _attention(q, k, v, _check_scale(op, scale, q.shape[3]), key_lengths)
    return (output, lse) if return_lse else output


def attention_packed(
    qkv: Tensor, *, scale: float | None = None, key_lengths: Tensor | None = None, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of the queries, keys and values of one projection, whose gradient is written as one tensor, with nothing to stack.

    Args:
        qkv: [B, N, 3, H, D], float32, bfloat16, float16 or float64, any strides; D from 1 to 256, any value.
        scale, key_lengths, return_lse: as for `attention`.

    Returns:
        As `attention(*qkv.unbind(2), ...)`, to the last bit.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "attention_packed"
    check_tensor(op, "qkv", qkv, dims=5)
    if qkv.shape[2] != 3 or not 1 <= qkv.shape[4] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: qkv must have shape (B, N, 3, H, D) with D from 1 to {MAX_HEAD_DIM}; got {tuple(qkv.shape)}")
    if key_lengths is not None:
        _check_lengths(op, key_lengths, "qkv", qkv)
    output, lse = _attention_packed(qkv, _check_scale(op, scale, qkv.shape[4]), key_lengths)
    return (output, lse) if return_lse else output


def attention_dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention and its derivative along (t_q, t_k, t_v) in one pass over the keys, without storing probabilities P:

    t_lse = rowsum(P t_S) and t_output = P (t_S - t_lse) v + P t_v, where t_S = scale (t_q k^T + q t_k^T).

    Args:
        q, k, v, scale, key_lengths: as for `attention`.
        t_q, t_k, t_v: tangents, of the shape and dtype of q, k and v, any strides; None stands for zeros.

    Returns:
        output and lse as from `attention`, and their tangents in the same shapes and dtypes. All are differentiable.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "attention_dual"
    _check(op, q, k, v, key_lengths)
    for name, tangent, like_name, like in (("t_q", t_q, "q", q), ("t_k", t_k, "k", k), ("t_v", t_v, "v", v)):
        if tangent is not None:
            check_like(op, name, tangent, like_name, like)
    return _attention_dual(q, k, v, _check_scale(op, scale, q.shape[3]), key_lengths, t_q, t_k, t_v)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None) -> None:
    check_tensor(op, "q", q, dims=4)
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: q must have a head dimension from 1 to {MAX_HEAD_DIM}; got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        _check_keys(op, name, x, q)
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"{op}: v must have as many rows as k, {k.shape[1]}; got shape {tuple(v.shape)}")
    if key_lengths is not None:
        _check_lengths(op, key_lengths, "q", q)


def _check_keys(op: str, name: str, x: Tensor, q: Tensor) -> None:
    check_tensor(op, name, x, dims=4)
    if (x.shape[0], *x.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(
            f"{op}: {name} must have shape ({q.shape[0]}, M, {q.shape[2]}, {q.shape[3]}), as q has {tuple(q.shape)}; got {tuple(x.shape)}"
        )
    if x.dtype != q.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of q, {q.dtype}; got {x.dtype}")
    check_device(op, name, x, "q", q)


def _check_lengths(op: str, key_lengths: Tensor, like_name: str, like: Tensor) -> None:
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"{op}: key_lengths must be a tensor; got {type(key_lengths).__name__}")
    if key_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: key_lengths must be int32 or int64; got {key_lengths.dtype}")
    if key_lengths.shape != like.shape[:1]:
        raise ValueError(f"{op}: key_lengths must have shape ({like.shape[0]},); got {tuple(key_lengths.shape)}")
    check_device(op, "key_lengths", key_lengths, like_name, like)


def _check_scale(op: str, scale: float | None, width: int) -> float:
    if scale is None:
        return width**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a number or None; got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite; got {scale}")
    return float(scale)
