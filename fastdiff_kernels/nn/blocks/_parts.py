"""Parts that several blocks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import check_choice, check_count, check_positive
from ...ops.attention import MAX_HEAD_DIM
from .._checks import divides
from .._policy import apply

HEAD_NORMS = ("rms", "layer", "rms_heads", "layer_heads")


def check_heads(num_heads: int, dim: int, name: str = "dim") -> int:
    """The width of a head, which attention must take; `num_heads` must divide `dim`."""
    divides("num_heads", check_count(num_heads, "num_heads"), name, check_count(dim, name))
    if dim // num_heads > MAX_HEAD_DIM:
        raise ValueError(f"{name} / num_heads must be at most {MAX_HEAD_DIM}, got {name}={dim} and num_heads={num_heads}")
    return dim // num_heads


def check_qk_norm(qk_norm: str | None, choices: tuple[str, ...]) -> str | None:
    """One of `choices`, or None."""
    return qk_norm if qk_norm is None else check_choice(qk_norm, "qk_norm", choices)


def qk_weight(qk_norm: str | None, num_heads: int, head_dim: int) -> nn.Parameter | None:
    """Ones: [D] for norms of each head, [heads * D] for norms over all of them."""
    if qk_norm is None:
        return None
    return nn.Parameter(torch.ones(num_heads * head_dim if qk_norm.endswith("_heads") else head_dim))


def feed_forward(dim: int, mlp_ratio: float) -> nn.Sequential:
    """Linear, GELU (tanh), Linear, with a hidden width of int(mlp_ratio * dim)."""
    hidden = int(dim * check_positive(mlp_ratio, "mlp_ratio"))
    if hidden < 1:
        raise ValueError(f"mlp_ratio must leave at least one hidden channel, got mlp_ratio={mlp_ratio} with dim={dim}")
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))


def check_rope(rope: tuple[Tensor, Tensor] | None) -> None:
    """Raise unless rope is a pair, or None; the op checks its tensors."""
    if rope is None:
        return
    if not isinstance(rope, (tuple, list)):
        raise TypeError(f"rope must be a pair of tensors (cos, sin) or None, got {type(rope).__name__}")
    if len(rope) != 2:
        raise ValueError(f"rope must be a pair of tensors (cos, sin), got {len(rope)} elements")
    for x in rope:
        if not isinstance(x, Tensor):
            raise TypeError(f"rope must be a pair of tensors (cos, sin), got a pair with a {type(x).__name__}")


def pixels(x: Tensor) -> Tensor:
    """The pixels of a feature map [B, C, H, W] as rows [B, H * W, C].

    Contiguous, since PyTorch multiplies strided rows sample by sample: it then adds the bias in a pass of its own, over more than the copy,
    and makes the weight's gradient once for each sample.
    """
    return x.flatten(2).transpose(1, 2).contiguous()


def split_heads(packed: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Views [B, N, heads, D] of one projection [B, N, parts * heads * D]."""
    return packed.unflatten(2, (parts, num_heads, packed.shape[2] // (parts * num_heads))).unbind(2)


def attend_to_itself(
    policy: str,
    packed: Tensor,
    num_heads: int,
    norm: str | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention [B, N, heads * D] of one projection [B, N, 3 * heads * D], q and k normalised and rotated first."""
    if norm is None and rope is None:
        return apply(policy, "attention_packed", packed.unflatten(2, (3, num_heads, -1))).flatten(2)
    q, k, v = split_heads(packed, 3, num_heads)  # [B, N, heads, D] each
    q, k = normalise_and_rotate(policy, norm, q, k, q_weight, k_weight, rope)
    return apply(policy, "attention", q, k, v).flatten(2)


def beside(companion: Tensor, x: Tensor) -> Tensor:
    """companion in a dtype that the ops take beside x: autocast computes modulation in 16 bits where x may be wider, and x in other 16 bits
    than those of parameters."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return companion if narrow and companion.dtype == torch.float32 else companion.to(x.dtype)


def normalise_and_rotate(
    policy: str,
    norm: str | None,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """q and k as attention takes them; untouched where there is nothing to do."""
    if norm is None and rope is None:
        return q, k
    wide = torch.promote_types(q.dtype, torch.float32)
    cos, sin = (None, None) if rope is None else (table.to(wide) for table in rope)
    q_weight, k_weight = (weight if weight is None else beside(weight, q) for weight in (q_weight, k_weight))
    return apply(policy, "qk_norm_rope", q, k, q_weight, k_weight, cos, sin, norm=norm)
