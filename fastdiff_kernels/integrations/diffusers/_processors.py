"""Attention processors: norms of q and k with the rotation, and attention, by ops; projections and the rest as diffusers does it.

Each is a subclass of the processor it stands in for, keeps that, and hands to it what it cannot do: masks other than key padding, another
attention backend, context parallelism.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.attention import MAX_HEAD_DIM
from .._policy import pays
from .._swap import is_watched
from ._deferred import branch
from ._host import AttnProcessor2_0, FluxAttnProcessor, JointAttnProcessor2_0, RMSNorm, WanAttnProcessor
from ._masks import key_lengths

BACKEND = "fastdiff"
"""This package's attention in diffusers' dispatcher."""


def _of_replaced(name: str) -> Any:
    return property(lambda self: getattr(self.replaced, name), lambda self, value: setattr(self.replaced, name, value))


class Fused:
    """Mixed into every processor here. `replaced` is what it stands in for; what diffusers sets on a processor is set on that one alone,
    so that it stays when `replaced` comes back."""

    gated = False
    """Whether the block multiplies the result by a gate and adds it to its stream (see `_deferred`)."""
    _attention_backend = _of_replaced("_attention_backend")
    _parallel_config = _of_replaced("_parallel_config")

    def __init__(self, replaced: Any) -> None:
        self.replaced = replaced


class FusedAttnProcessor(Fused, AttnProcessor2_0):
    """For `AttnProcessor2_0`: U-Nets, DiT, PixArt."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if _is_watched(attn):
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        lengths = None
        if attention_mask is not None:
            lengths = key_lengths(attention_mask, *_keys(hidden_states if encoder_hidden_states is None else encoder_hidden_states))
            if lengths is None:
                _say_once(_TRACED if torch.compiler.is_compiling() else _NO_PADDING)
                return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [B, H W, C]
        if attn.group_norm is not None:
            hidden_states = _group_norm(attn.group_norm, hidden_states)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross is not None:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

        heads = (attn.heads, -1)
        query = attn.to_q(hidden_states).unflatten(-1, heads)  # [B, N, H, D]
        key = attn.to_k(encoder_hidden_states).unflatten(-1, heads)
        value = attn.to_v(encoder_hidden_states).unflatten(-1, heads)
        query, key = normed(attn.norm_q, attn.norm_k, query, key)
        hidden_states = attend(query, key, value, lengths)

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        if attn.rescale_output_factor != 1:
            hidden_states = hidden_states / attn.rescale_output_factor
        return branch(attn, hidden_states) if self.gated else hidden_states


class FusedJointAttnProcessor(Fused, JointAttnProcessor2_0):
    """For `JointAttnProcessor2_0`: both streams of SD3, and the second self-attention of SD3.5."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if _is_watched(attn):
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        tokens, heads = hidden_states.shape[1], (attn.heads, -1)
        query, key, value = (project(hidden_states).unflatten(-1, heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        query, key = normed(attn.norm_q, attn.norm_k, query, key)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            query2, key2, value2 = (project(encoder_hidden_states).unflatten(-1, heads) for project in added)
            query2, key2 = normed(attn.norm_added_q, attn.norm_added_k, query2, key2)
            query, key, value = torch.cat((query, query2), 1), torch.cat((key, key2), 1), torch.cat((value, value2), 1)
        attended = attend(query, key, value)
        hidden_states = attn.to_out[1](attn.to_out[0](attended[:, :tokens]))
        hidden_states = branch(attn, hidden_states) if self.gated else hidden_states
        if encoder_hidden_states is None:
            return hidden_states
        context = attended[:, tokens:]
        if attn.context_pre_only:
            return hidden_states, context
        context = attn.to_add_out(context)
        return hidden_states, branch(attn, context) if self.gated else context


class FusedFluxAttnProcessor(Fused, FluxAttnProcessor):
    """For `FluxAttnProcessor`: blocks of one and of two streams."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if _is_watched(attn):
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None or _has_choices(self):
            _say_once("an attention mask, another attention backend or context parallelism is left to diffusers' Flux processor")
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        cos = sin = None
        if image_rotary_emb is not None:
            # Each angle stands twice, once for each element of a pair.
            cos, sin = (angles.to(hidden_states.device)[:, ::2] for angles in image_rotary_emb)  # [N, D/2]
        heads = (-1, attn.head_dim)
        query, key, value = (part.unflatten(-1, heads) for part in _projections(attn, "to_qkv", "to_q", "to_k", "to_v", hidden_states))
        text = 0 if attn.added_kv_proj_dim is None else encoder_hidden_states.shape[1]  # type: ignore[union-attr]
        query, key = normed(attn.norm_q, attn.norm_k, query, key, _rows(cos, text, None), _rows(sin, text, None))
        if attn.added_kv_proj_dim is not None:
            added = _projections(attn, "to_added_qkv", "add_q_proj", "add_k_proj", "add_v_proj", encoder_hidden_states)
            query2, key2, value2 = (part.unflatten(-1, heads) for part in added)
            query2, key2 = normed(attn.norm_added_q, attn.norm_added_k, query2, key2, _rows(cos, 0, text), _rows(sin, 0, text))
            query, key, value = torch.cat((query2, query), 1), torch.cat((key2, key), 1), torch.cat((value2, value), 1)
        attended = attend(query, key, value)
        if encoder_hidden_states is None:
            return attended
        text = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](attended[:, text:].contiguous()))
        context = attn.to_add_out(attended[:, :text].contiguous())
        return (branch(attn, image), branch(attn, context)) if self.gated else (image, context)


class FusedWanAttnProcessor(Fused, WanAttnProcessor):
    """For `WanAttnProcessor`: self-attention with rotation, cross-attention to text and, in image-to-video, to the image."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if _is_watched(attn):
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        # How many of the keys belong to an image is a constant inside diffusers' processor.
        if attention_mask is not None or attn.add_k_proj is not None or _has_choices(self):
            _say_once("image keys, an attention mask, another attention backend or context parallelism is left to diffusers' Wan processor")
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        cos = sin = None
        if rotary_emb is not None:
            cos, sin = rotary_emb[0][0, :, 0, 0::2], rotary_emb[1][0, :, 0, 1::2]  # [N, D/2]
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if not attn.fused_projections:
            parts = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        elif attn.is_cross_attention:
            parts = attn.to_q(hidden_states), *attn.to_kv(source).chunk(2, dim=-1)
        else:
            parts = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in parts)  # [B, N, H, D]
        query, key = normed(attn.norm_q, attn.norm_k, query, key, cos, sin)
        hidden_states = attn.to_out[1](attn.to_out[0](attend(query, key, value)))
        return branch(attn, hidden_states) if self.gated else hidden_states


REPLACEMENTS: dict[type, type] = {
    AttnProcessor2_0: FusedAttnProcessor,
    JointAttnProcessor2_0: FusedJointAttnProcessor,
    FluxAttnProcessor: FusedFluxAttnProcessor,
    WanAttnProcessor: FusedWanAttnProcessor,
}


def refusal(attn: Any) -> str | None:
    """Why this attention's processor is left, or None."""
    if type(attn.processor) not in REPLACEMENTS:
        return f"its processor {type(attn.processor).__name__} is not one that is known here"
    width = getattr(attn, "inner_dim", 0) // attn.heads
    if width > MAX_HEAD_DIM:
        return f"its head dimension {width} is above {MAX_HEAD_DIM}"
    if getattr(attn, "inner_kv_dim", attn.inner_dim) != attn.inner_dim:
        return "it has fewer heads for keys than for queries"
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention of heads [B, N, H, D] to [B, M, H, D], as tokens [B, N, H D]."""
    return cast(Tensor, ops.attention(query, key, value, scale=scale, key_lengths=lengths)).flatten(2)


def normed(
    norm_q: Any, norm_k: Any, query: Tensor, key: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """norm_q(query) and norm_k(key), [B, N, H, D], rotated by cos and sin [N, D/2] where given: one op where the norms allow it."""
    kind, q_weight, k_weight, eps = None, None, None, 1e-6
    if norm_q is not None or norm_k is not None:
        found = _one_norm(norm_q, norm_k, query)
        if found is None:
            query, key = _apply(norm_q, query), _apply(norm_k, key)
        else:
            kind, q_weight, k_weight, eps = found
    if kind is None and cos is None:
        return query, key
    if cos is not None and sin is not None and cos.dtype not in (query.dtype, torch.float32 if query.itemsize < 4 else query.dtype):
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)
    return ops.qk_norm_rope(query, key, q_weight, k_weight, cos, sin, norm=kind, eps=eps)


def _one_norm(norm_q: Any, norm_k: Any, query: Tensor) -> tuple[str, Tensor | None, Tensor | None, float] | None:
    """(norm, weights, eps) as `ops.qk_norm_rope` takes them, or None where the two norms are not one of its."""
    if type(norm_q) is not type(norm_k) or norm_q is None or norm_k is None:
        return None
    if isinstance(norm_q, (nn.RMSNorm, RMSNorm)):
        kind = "rms"
    elif isinstance(norm_q, nn.LayerNorm):
        kind = "layer"
    else:
        return None
    weights = (norm_q.weight, norm_k.weight)
    if getattr(norm_q, "bias", None) is not None or getattr(norm_k, "bias", None) is not None or norm_q.eps != norm_k.eps:
        return None
    if norm_q.eps is None or any(w is not None and w.dtype not in (query.dtype, torch.float32) for w in weights):
        return None
    (width,) = norm_q.dim if isinstance(norm_q, RMSNorm) else norm_q.normalized_shape
    return f"{kind}_heads" if width != query.shape[3] else kind, *weights, norm_q.eps


def _apply(norm: Any, x: Tensor) -> Tensor:
    if norm is None:
        return x
    shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None))
    across = isinstance(shape, tuple) and tuple(shape) == (x.shape[2] * x.shape[3],) and x.shape[2] > 1
    return norm(x.flatten(2)).unflatten(2, x.shape[2:]) if across else norm(x)


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """The norm of tokens [B, N, C] over their channels."""
    x = x.transpose(1, 2)
    if torch.compiler.is_compiling() or not pays("group_norm", x):
        return norm(x).transpose(1, 2)
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation=None).transpose(1, 2)


def _projections(attn: Any, packed: str, q: str, k: str, v: str, x: Tensor | None) -> tuple[Tensor, ...]:
    if attn.fused_projections:
        return getattr(attn, packed)(x).chunk(3, dim=-1)
    return getattr(attn, q)(x), getattr(attn, k)(x), getattr(attn, v)(x)


def _rows(angles: Tensor | None, start: int, stop: int | None) -> Tensor | None:
    return None if angles is None else angles[start:stop]


def _keys(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1] if x.dim() == 3 else x.shape[2:].numel()


def _is_watched(attn: Any) -> bool:
    """Whether hooks wait for what an op does here, in the layout in which diffusers does it."""
    find = attn._modules.get  # getattr takes five times as long
    for name in ("group_norm", "norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        norm = find(name)
        if norm is not None and is_watched(norm):
            return True
    return False


def _has_choices(processor: Any) -> bool:
    backend = getattr(processor, "_attention_backend", None)
    return backend not in (None, BACKEND) or getattr(processor, "_parallel_config", None) is not None


_NO_PADDING = "an attention mask that is not padding behind the keys is left to diffusers' processor"
_TRACED = (
    "an attention mask in a compiled graph is left to diffusers' processor: whether it is padding behind the keys is in its values, which "
    "are not known while the graph is traced"
)
_said: set[str] = set()


@torch.compiler.assume_constant_result  # runs while a graph is traced, and leaves nothing in it
def _say_once(what: str) -> bool:
    if what in _said:
        return False
    _said.add(what)
    warnings.warn(what, stacklevel=3)
    return True
