"""Attention for ComfyUI, by the override that its models look for. ComfyUI is not imported."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from ..ops.attention import MAX_HEAD_DIM

__all__ = ["KEY", "attention_override", "install"]

KEY = "optimized_attention_override"
# What the last argument of ComfyUI's attention functions carries beside the tensors.
_HARMLESS = ("transformer_options", "attn_precision")


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

    q, k, v are [B, N, heads D], or [B, heads, N, D] with skip_reshape, and so is the result, with skip_output_reshape. Calls with a mask,
    with heads wider than 256, with fewer heads for keys than for queries, or with arguments that are not known here go to `previous`, or
    to ComfyUI's `func`.

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
        parts = [x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (heads, -1)) for x in (q, k, v)]  # [B, N, H, D]
        alike = len({(x.shape[2:], x.dtype) for x in parts}) == 1
        if mask is None and alike and parts[0].shape[3] <= MAX_HEAD_DIM and not (set(kwargs) - set(_HARMLESS)):
            attended = cast(Tensor, ops.attention(*parts))
            return attended.transpose(1, 2) if skip_output_reshape else attended.flatten(2)
        options = {"mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        if previous is not None:
            return previous(func, q, k, v, heads, **options, **kwargs)
        return func(q, k, v, heads, **options, **kwargs)

    return override
