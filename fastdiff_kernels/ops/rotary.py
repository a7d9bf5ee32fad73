"""Normalisation of queries and keys (arXiv 2010.04245) and rotary position embedding (Su et al., arXiv 2104.09864), both in one pass; and
the pixel norm of queries, keys and values (Karras et al., arXiv 2312.02696)."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import bind
from ._checks import check_choice, check_companion_dtype, check_device, check_like, check_positive, check_tensor

_qk_norm_rope = bind("qk_norm_rope")
_pixel_norm = bind("pixel_norm")
_qkv_pixel_norm = bind("qkv_pixel_norm")

NORMS = ("rms", "layer", "rms_heads", "layer_heads", "pixel", None)
_WEIGHTED = ("rms", "layer", "rms_heads", "layer_heads")


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: str | None = "rms",
    rope: str = "interleaved",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """rotate(norm(x) * weight) for x = q and x = k.

    The norms are "rms", x / sqrt(mean(x^2) + eps), and "layer", (x - mean) / sqrt(variance + eps), over each head; "rms_heads" and
    "layer_heads", the same over all heads of a token; "pixel", x / (eps + sqrt(mean(x^2))) over each head; and None. The rotation turns
    each pair (a, b) of a head into (a cos - b sin, a sin + b cos): pairs of neighbours (2i, 2i + 1) for "interleaved", of
    (i, D/2 + i) for "half".

    Args:
        q, k: [B, N, H, D], float32, bfloat16, float16 or float64, any strides: parts of one packed projection [B, N, 3, H, D] are read
            in place, and so are those of [B, H, D, 3, N], tokens innermost (a norm over all heads copies them on a GPU). They share
            B, H and D, and with cos and sin also N.
        q_weight, k_weight: [D], or [H * D] for norms over all heads; q's dtype or float32; None means ones. The norms
            "pixel" and None take no weight.
        cos, sin: [N, D/2] or [B, N, D/2], both alike, q's dtype or float32; D even. None, both of them, means no rotation.
        norm: as above.
        rope: "interleaved" or "half"; without cos and sin it has no effect.
        eps: greater than 0.

    Returns:
        Two tensors [B, N, H, D] contiguous, q's dtype. Differentiable in all tensors; a gradient for cos or sin is that of the definition
        in PyTorch, at its speed.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "qk_norm_rope"
    check_choice(op, "norm", norm, NORMS)
    check_choice(op, "rope", rope, ("interleaved", "half"))
    _check_queries_and_keys(op, q, k)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _check_weight(op, name, weight, norm, q)
    _check_angles(op, cos, sin, q, k)
    return _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, norm, rope, check_positive(op, "eps", eps))


def pixel_norm(x: Tensor, *, eps: float = 1e-4) -> Tensor:
    """x / (eps + sqrt(mean(x^2))) over each head: the pixel norm of EDM2 (arXiv 2312.02696, section 2).

    One projection [B, N, 3, H, D] is normalised at once as 3 H heads, `pixel_norm(packed.flatten(2, 3))`, which `attention_packed` takes
    in turn; a feature map over its channels as [B, H W, 1, C].

    Args:
        x: [B, N, H, D], float32, bfloat16, float16 or float64, any strides.
        eps: greater than 0.

    Returns:
        [B, N, H, D] contiguous, x's dtype. Differentiable in x; at a head of zeros the slope is 1 / eps.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "pixel_norm"
    check_tensor(op, "x", x, dims=4)
    if min(x.shape[2:]) < 1:
        raise ValueError(f"{op}: x must have at least one head and one channel a head; got shape {tuple(x.shape)}")
    return _pixel_norm(x, check_positive(op, "eps", eps))


def qkv_pixel_norm(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """x / (eps + sqrt(mean(x^2))) over each head, for x = q, k and v: the pixel norm of EDM2's attention (arXiv 2312.02696, section 2).

    Three tensors in, three gradients out: where q, k and v are parts of one projection [B, N, 3, H, D], PyTorch stacks these again, which
    `pixel_norm` of the whole spares.

    Args:
        q: [B, N, H, D], float32, bfloat16, float16 or float64, any strides: parts of one packed projection [B, N, 3, H, D] or, tokens
            innermost, [B, H, D, 3, N] are read in place.
        k, v: the same, of one shape; their N may be another.
        eps: greater than 0.

    Returns:
        Three tensors [B, N, H, D] contiguous, q's dtype. Differentiable in all three; at a head of zeros the slope is 1 / eps.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "qkv_pixel_norm"
    _check_queries_and_keys(op, q, k)
    check_like(op, "v", v, "k", k)
    return _qkv_pixel_norm(q, k, v, check_positive(op, "eps", eps))


def _check_queries_and_keys(op: str, q: Tensor, k: Tensor) -> None:
    check_tensor(op, "q", q, dims=4)
    check_tensor(op, "k", k, dims=4)
    if min(q.shape[2:]) < 1:
        raise ValueError(f"{op}: q must have at least one head and one channel a head; got shape {tuple(q.shape)}")
    if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(f"{op}: k must have the batch, heads and head dimension of q, {tuple(q.shape)}; got {tuple(k.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k must have the dtype of q, {q.dtype}; got {k.dtype}")
    check_device(op, "k", k, "q", q)


def _check_weight(op: str, name: str, weight: Tensor, norm: str | None, q: Tensor) -> None:
    if norm not in _WEIGHTED:
        raise ValueError(f"{op}: {name} must be None for norm={norm!r}, which has no weight")
    check_tensor(op, name, weight)
    heads, width = q.shape[2:]
    size = heads * width if norm.endswith("_heads") else width
    if weight.shape != (size,):
        raise ValueError(
            f"{op}: {name} must have shape ({size},) for norm={norm!r} and q of shape {tuple(q.shape)}; got {tuple(weight.shape)}"
        )
    check_companion_dtype(op, name, weight, "q", q)
    check_device(op, name, weight, "q", q)


def _check_angles(op: str, cos: Tensor | None, sin: Tensor | None, q: Tensor, k: Tensor) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        missing, given = ("cos", "sin") if cos is None else ("sin", "cos")
        raise ValueError(f"{op}: {missing} must be given beside {given}")
    batch, rows, _, width = q.shape
    if width % 2:
        raise ValueError(f"{op}: q must have an even head dimension to be rotated; got shape {tuple(q.shape)}")
    if k.shape[1] != rows:
        raise ValueError(f"{op}: k must have as many rows as q, {rows}, to be rotated by the same angles; got shape {tuple(k.shape)}")
    for name, x in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, x)
        if x.shape not in ((rows, width // 2), (batch, rows, width // 2)):
            raise ValueError(
                f"{op}: {name} must have shape ({rows}, {width // 2}) or ({batch}, {rows}, {width // 2}); got {tuple(x.shape)}"
            )
        check_companion_dtype(op, name, x, "q", q)
        check_device(op, name, x, "q", q)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"{op}: sin must have the shape and dtype of cos, {tuple(cos.shape)} {cos.dtype}; got {tuple(sin.shape)} {sin.dtype}"
        )
