"""Definitions: the attention blocks of score networks, as functions of a mapping of parameters and of their inputs.

The parameters are named and shaped as in the state dict of the module of the same name in `fastdiff_kernels.nn`. Written with what PyTorch
offers anyone and with none of the ops' definitions, so that a block and its definition err independently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Parameters = Mapping[str, Tensor]


def dit_block(
    parameters: Parameters,
    x: Tensor,
    condition: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
    *,
    num_heads: int,
    qk_norm: str | None = None,
) -> Tensor:
    """adaLN-Zero transformer block (Peebles and Xie, arXiv 2212.09748). x [B, N, C], condition [B, condition_dim] -> [B, N, C]."""
    chunks = _linear(parameters, "modulation", F.silu(condition)).unsqueeze(1).chunk(6, dim=2)  # [B, 1, C] each
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks
    q, k, v = _packed_heads(parameters, "qkv", _modulated(x, shift_a, scale_a), 3, num_heads)
    q, k = (_head_norm(t, qk_norm, parameters.get(f"{name}_weight")) for name, t in (("q", q), ("k", k)))
    if rope is not None:
        q, k = _rotated(q, *rope), _rotated(k, *rope)
    x = x + gate_a * _linear(parameters, "attention_out", _attention(q, k, v))
    return x + gate_m * _feed_forward(parameters, "mlp", _modulated(x, shift_m, scale_m))


def pixart_block(
    parameters: Parameters,
    x: Tensor,
    time: Tensor,
    context: Tensor,
    key_lengths: Tensor | None = None,
    *,
    num_heads: int,
    qk_norm: str | None = None,
) -> Tensor:
    """adaLN-single block with cross-attention (Chen et al., arXiv 2310.00426). x [B, N, C], time [B, 6, C], context [B, M, C_text]."""
    table = parameters["scale_shift_table"] + time.reshape(x.shape[0], 6, x.shape[2])  # [B, 6, C]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = table.chunk(6, dim=1)  # [B, 1, C] each
    q, k, v = _packed_heads(parameters, "qkv", _modulated(x, shift_a, scale_a), 3, num_heads)
    q, k = (_head_norm(t, qk_norm, parameters.get(f"{name}_weight")) for name, t in (("q", q), ("k", k)))
    x = x + gate_a * _linear(parameters, "attention_out", _attention(q, k, v))
    (q,) = _packed_heads(parameters, "cross_q", x, 1, num_heads)
    k, v = _packed_heads(parameters, "cross_kv", context, 2, num_heads)
    x = x + _linear(parameters, "cross_out", _attention(q, k, v, key_lengths))
    return x + gate_m * _feed_forward(parameters, "mlp", _modulated(x, shift_m, scale_m))


def unet_attention_block(
    parameters: Parameters,
    x: Tensor,
    *,
    num_heads: int = 1,
    num_groups: int = 8,
    qk_norm: str | None = None,
    eps: float = 1e-5,
    skip_scale: float = 1.0,
) -> Tensor:
    """Attention over the pixels of x [B, C, H, W] (Dhariwal and Nichol, arXiv 2105.05233; skip_scale: Song et al., arXiv 2011.13456)."""
    h = F.group_norm(x, num_groups, parameters["norm_weight"], parameters["norm_bias"], eps)
    q, k, v = _packed_heads(parameters, "qkv", h.flatten(2).transpose(1, 2), 3, num_heads)
    q, k = (_head_norm(t, qk_norm, parameters.get(f"{name}_weight")) for name, t in (("q", q), ("k", k)))
    attended = _linear(parameters, "out", _attention(q, k, v))  # [B, N, C]
    return (x + attended.transpose(1, 2).reshape(x.shape)) * skip_scale


def edm2_attention_block(
    parameters: Parameters,
    x: Tensor,
    *,
    num_heads: int = 1,
    balance: float = 0.3,
    clip: float | None = 256.0,
    eps: float = 1e-4,
) -> Tensor:
    """Magnitude-preserving attention over the pixels of x [B, C, H, W] (Karras et al., arXiv 2312.02696, section 2 and appendix B)."""
    batch, channels = x.shape[:2]
    qkv = F.conv2d(x, _unit_rows(parameters["qkv.weight"], eps)[:, :, None, None])  # [B, 3C, H, W]
    qkv = qkv.reshape(batch, 3, num_heads, channels // num_heads, -1).transpose(3, 4)  # [B, 3, heads, N, D]
    q, k, v = (qkv / (qkv.square().mean(4, keepdim=True).sqrt() + eps)).unbind(1)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
    branch = F.conv2d(attended, _unit_rows(parameters["out.weight"], eps)[:, :, None, None])
    y = ((1 - balance) * x + balance * branch) / math.hypot(1 - balance, balance)
    return y if clip is None else y.clamp(-clip, clip)


def mmdit_block(
    parameters: Parameters,
    x: Tensor,
    context: Tensor,
    condition: Tensor,
    *,
    num_heads: int,
    qk_norm: str | None = None,
    context_pre_only: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Two streams with joint attention (Esser et al., arXiv 2403.03206). x [B, N, C], context [B, M, C], condition [B, condition_dim]."""
    streams, mods = {"": x, "context_": context}, {}
    queries, keys, values = [], [], []
    for prefix, stream in streams.items():
        modulation = _linear(parameters, f"{prefix}modulation", F.silu(condition)).unsqueeze(1)
        mods[prefix] = modulation.chunk(2 if prefix and context_pre_only else 6, dim=2)
        q, k, v = _packed_heads(parameters, f"{prefix}qkv", _modulated(stream, *mods[prefix][:2]), 3, num_heads)
        queries.append(_head_norm(q, qk_norm, parameters.get(f"{prefix}q_weight")))
        keys.append(_head_norm(k, qk_norm, parameters.get(f"{prefix}k_weight")))
        values.append(v)
    joint = _attention(torch.cat(queries, 1), torch.cat(keys, 1), torch.cat(values, 1))  # [B, N + M, C]
    parts, outputs = joint.split([x.shape[1], context.shape[1]], dim=1), []
    for (prefix, stream), attended in zip(streams.items(), parts, strict=True):
        if prefix and context_pre_only:
            continue
        _, _, gate_a, shift_m, scale_m, gate_m = mods[prefix]
        h = stream + gate_a * _linear(parameters, f"{prefix}attention_out", attended)
        outputs.append(h + gate_m * _feed_forward(parameters, f"{prefix}mlp", _modulated(h, shift_m, scale_m)))
    return outputs[0], None if context_pre_only else outputs[1]


def _linear(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    return F.linear(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])


def _feed_forward(parameters: Parameters, name: str, x: Tensor) -> Tensor:
    return _linear(parameters, f"{name}.2", F.gelu(_linear(parameters, f"{name}.0", x), approximate="tanh"))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _packed_heads(parameters: Parameters, name: str, x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """`parts` tensors [B, N, heads, D] of one projection."""
    return _linear(parameters, name, x).unflatten(2, (parts, num_heads, -1)).unbind(2)


def _head_norm(x: Tensor, norm: str | None, weight: Tensor | None) -> Tensor:
    if norm is None:
        return x
    rows = x.flatten(2) if norm.endswith("_heads") else x
    if norm.startswith("rms"):
        return F.rms_norm(rows, rows.shape[-1:], weight, 1e-6).view_as(x)
    return F.layer_norm(rows, rows.shape[-1:], weight, eps=1e-6).view_as(x)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring channels of x [B, N, heads, D] turned by the angles of cos, sin [N, D/2]."""
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


def _attention(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    """[B, N, heads, D] with keys and values [B, M, heads, D] -> [B, N, heads * D]."""
    mask = None
    if key_lengths is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < key_lengths[:, None])[:, None, None]  # [B, 1, 1, M]
    attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return attended.transpose(1, 2).flatten(2)


def _unit_rows(weight: Tensor, eps: float) -> Tensor:
    """Rows of length 1 (eq. 47: forced unit variance, then division by the root of the fan-in)."""
    norm = weight.norm(dim=1, keepdim=True)
    return weight / (norm + eps * math.sqrt(weight.shape[1]))
