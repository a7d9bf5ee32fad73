"""Definition: normalisation of queries and keys with rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype


def _normalise(x: Tensor, weight: Tensor | None, norm: str | None, eps: float) -> Tensor:
    if norm is None:
        return x
    if norm == "pixel":
        squares = x.square().mean(-1, keepdim=True)
        # The root of 0 has an infinite slope, which would make the gradient of a head of zeros NaN rather than 1 / eps.
        zero = squares == 0
        return x / (eps + torch.where(zero, 1, squares).sqrt().masked_fill(zero, 0))
    over_heads = norm.endswith("_heads")
    rows = x.flatten(-2) if over_heads else x
    if norm.startswith("layer"):
        rows = rows - rows.mean(-1, keepdim=True)
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        rows = rows * weight.to(rows.dtype)
    return rows.unflatten(-1, x.shape[-2:]) if over_heads else rows


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))  # [N, 1, D/2] or [B, N, 1, D/2]
    first, second = (x[..., 0::2], x[..., 1::2]) if rope == "interleaved" else x.chunk(2, dim=-1)
    rotated = first * cos - second * sin, first * sin + second * cos
    return torch.stack(rotated, dim=-1).flatten(-2) if rope == "interleaved" else torch.cat(rotated, dim=-1)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: str | None = "rms",
    rope: str = "interleaved",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Each of q, k [B, N, H, D]: rotate(norm(x) * weight)."""
    outputs = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = _normalise(x.to(compute_dtype(x)), weight, norm, eps)
        if cos is not None and sin is not None:
            y = _rotate(y, cos, sin, rope)
        outputs.append(y.to(x.dtype))
    return outputs[0], outputs[1]


def pixel_norm(x: Tensor, eps: float = 1e-4) -> Tensor:
    """x / (eps + sqrt(mean(x^2) over the last dimension))."""
    return _normalise(x.to(compute_dtype(x)), None, "pixel", eps).to(x.dtype)


def qkv_pixel_norm(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """pixel_norm of each of q, k, v [B, N, H, D]."""
    return pixel_norm(q, eps), pixel_norm(k, eps), pixel_norm(v, eps)
