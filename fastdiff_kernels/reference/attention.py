"""Definition: softmax attention without a causal mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, key_lengths: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v for q [B, N, H, D], k and v [B, M, H, D]; keys from key_lengths[b] on do not exist."""
    dtype = compute_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = k.to(dtype), v.to(dtype)
    if key_lengths is not None:
        present = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]  # [B, M]
        # What stands in the padding may be NaN, which a zero probability would not remove.
        keys, values = (t.masked_fill(~present[:, :, None, None], 0) for t in (keys, values))
    logits = torch.einsum("bnhd,bmhd->bhnm", q.to(dtype), keys) * scale
    if key_lengths is not None:
        logits = logits.masked_fill(~present[:, None, None], -torch.inf)
        nothing = ~present.any(1)[:, None, None, None]  # [B, 1, 1, 1]
        probabilities = logits.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    else:
        probabilities = logits.softmax(-1) if k.shape[1] else logits
    return torch.einsum("bhnm,bmhd->bnhd", probabilities, values).to(q.dtype)
