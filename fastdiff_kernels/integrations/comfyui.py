"""Attention for ComfyUI, by the override that its models look for. ComfyUI is not imported."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..ops._checks import DTYPES
from ..ops.attention import MAX_HEAD_DIM

__all__ = ["KEY", "attention_override", "install"]

KEY = "optimized_attention_override"
# What ComfyUI passes beside the tensors that says nothing about the result: its guard against asking for the override twice, which has to
# reach whatever is called next, its models' options, and whether keys may be quantised, which nothing here is.
_HARMLESS = {"_inside_attn_wrapper", "transformer_options", "low_precision_attention"}
_UNDERSTOOD = _HARMLESS | {"scale", "enable_gqa"}


def install(transformer_options: MutableMapping[str, Any]) -> Callable[..., Tensor]:
    """Puts `attention_override` into a model clone's `transformer_options`, in front of an override that is there already.

    Returns:
        What was put there. `del transformer_options[KEY]`, or putting back what was there, undoes it.
    """
    override = attention_override(transformer_options.get(KEY))
    transformer_options[KEY] = override
    return override


def attention_override(previous: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """A callable override(func, q, k, v, heads, mask=None, ...) that attends by `ops.attention`.

    q, k, v are [B, N, heads D], or [B, heads, N, D] with skip_reshape, and so is the result, with skip_output_reshape. k and v may have
    fewer heads with enable_gqa, each for as many consecutive ones of q; `scale` stands for 1 / sqrt(D). Calls with a mask, with heads
    wider than 256, of another dtype than the op's, or with arguments that are not known here go to `previous`, or to ComfyUI's `func`,
    as they came.

    Args:
        previous: another override, called as override(func, ...).
    """

    def override(
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        if mask is None and kwargs.keys() <= _UNDERSTOOD:
            parts = _by_heads(q, k, v, heads, skip_reshape, kwargs.get("enable_gqa", False))
            if parts is not None:
                attended = _attention(*parts, kwargs.get("scale"))
                return attended.transpose(1, 2) if skip_output_reshape else attended.flatten(2)
        options = {"mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        if previous is not None:
            return previous(func, q, k, v, heads, **options, **kwargs)
        return func(q, k, v, heads, **options, **kwargs)

    return override


def _by_heads(q: Tensor, k: Tensor, v: Tensor, heads: int, heads_first: bool, grouped: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """q [B, N, H, D], and k and v [B, M, G, D] with G = H, or a divisor of H where heads are grouped; None for what is none of these."""
    if any(x.dim() != (4 if heads_first else 3) or x.dtype != q.dtype for x in (q, k, v)) or q.dtype not in DTYPES:
        return None
    width = q.shape[3] if heads_first else q.shape[2] // heads
    if not 1 <= width <= MAX_HEAD_DIM or any(x.shape[-1] % width for x in (q, k, v)):
        return None
    q, k, v = (x.transpose(1, 2) if heads_first else x.unflatten(2, (-1, width)) for x in (q, k, v))
    alike = k.shape == v.shape and (q.shape[0], width) == (k.shape[0], k.shape[3]) and q.shape[2] == heads
    fits = k.shape[2] == heads or (grouped and k.shape[2] > 0 and heads % k.shape[2] == 0)
    return (q, k, v) if alike and fits else None


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """[B, N, H, D]. Queries of heads that share keys are to the op as many tokens of one head, so that no key is repeated."""
    batch, tokens, heads, width = q.shape
    if k.shape[2] == heads:
        return cast(Tensor, ops.attention(q, k, v, scale=scale))
    shared = q.unflatten(2, (k.shape[2], -1)).transpose(2, 3)  # [B, N, H / G, G, D]
    attended = cast(Tensor, ops.attention(shared.flatten(1, 2), k, v, scale=scale))
    return attended.view(shared.shape).transpose(2, 3).reshape(batch, tokens, heads, width)
