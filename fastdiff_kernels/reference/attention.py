"""Definition: softmax attention without a causal mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, key_lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v for q [B, N, H, D], k and v [B, M, H, D]; keys from key_lengths[b] on do not exist.

    Also the logarithm of the softmax's denominator, [B, H, N]: minus infinity where there is no key.
    """
    logits, values = _logits(q, k, scale, key_lengths), _present(v, key_lengths)  # [B, H, N, M]
    return _attend(_probabilities(logits, key_lengths), values).to(q.dtype), _log_sum_exp(logits, key_lengths)


def attention_packed(qkv: Tensor, scale: float | None = None, key_lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same of one projection qkv [B, N, 3, H, D]."""
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale, key_lengths)


def attention_dual(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, key_lengths: Tensor | None = None,
    t_q: Tensor | None = None, t_k: Tensor | None = None, t_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same and its derivative along (t_q, t_k, t_v), None standing for zeros: output, log-sum-exp and the tangents of both."""
    logits, values = _logits(q, k, scale, key_lengths), _present(v, key_lengths)
    t_logits = torch.zeros_like(logits)
    for query, key in ((t_q, k), (q, t_k)):
        if query is not None and key is not None:
            t_logits = t_logits + _products(query, key, scale, key_lengths)
    probabilities = _probabilities(logits, key_lengths)
    t_lse = (probabilities * t_logits).sum(-1)  # [B, H, N]
    t_output = _attend(probabilities * (t_logits - t_lse[..., None]), values)
    if t_v is not None:
        t_output = t_output + _attend(probabilities, _present(t_v, key_lengths))
    return _attend(probabilities, values).to(q.dtype), _log_sum_exp(logits, key_lengths), t_output.to(q.dtype), t_lse


def _mask(keys: int, key_lengths: Tensor) -> Tensor:
    return torch.arange(keys, device=key_lengths.device) < key_lengths[:, None]  # [B, M]


def _present(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Keys or values in the dtype that is computed in, the padding zero: it may be NaN, which a zero probability would not remove."""
    wide = x.to(compute_dtype(x))
    return wide if key_lengths is None else wide.masked_fill(~_mask(x.shape[1], key_lengths)[:, :, None, None], 0)


def _products(q: Tensor, k: Tensor, scale: float | None, key_lengths: Tensor | None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("bnhd,bmhd->bhnm", q.to(compute_dtype(q)), _present(k, key_lengths)) * scale


def _logits(q: Tensor, k: Tensor, scale: float | None, key_lengths: Tensor | None) -> Tensor:
    logits = _products(q, k, scale, key_lengths)
    return logits if key_lengths is None else logits.masked_fill(~_mask(k.shape[1], key_lengths)[:, None, None], -torch.inf)


def _without_keys(key_lengths: Tensor) -> Tensor:
    return (key_lengths <= 0)[:, None, None]  # [B, 1, 1]


def _probabilities(logits: Tensor, key_lengths: Tensor | None) -> Tensor:
    if key_lengths is None or not logits.shape[-1]:
        return logits.softmax(-1) if logits.shape[-1] else logits
    nothing = _without_keys(key_lengths)[..., None]
    return logits.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)


def _attend(probabilities: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, values)


def _log_sum_exp(logits: Tensor, key_lengths: Tensor | None) -> Tensor:
    if not logits.shape[-1]:
        return logits.sum(-1) - torch.inf
    if key_lengths is None:
        return logits.logsumexp(-1)
    nothing = _without_keys(key_lengths)
    return logits.masked_fill(nothing[..., None], 0).logsumexp(-1).masked_fill(nothing, -torch.inf)
