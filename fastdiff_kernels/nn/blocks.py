"""The blocks of the two networks, each usable alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from .._checks import check_count
from ._checks import divides
from .embedding import zero_init


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (Peebles and Xie 2022).

    With (shift, scale, gate) x 2 = Linear(silu(condition)):
    x <- x + gate * attention(LN(x) (1 + scale) + shift), then the same with an MLP. Starts as the identity.

    Args:
        dim: channels C.
        num_heads: heads, dividing C.
        condition_dim: width of the conditioning vector.
        mlp_ratio: hidden width of the MLP over C.
        qk_norm: "rms", "layer" (per head, learned weight) or None.
    """

    def __init__(self, dim: int, num_heads: int, condition_dim: int, *, mlp_ratio: float = 4.0, qk_norm: str | None = None) -> None:
        super().__init__()
        divides("num_heads", check_count(num_heads, "num_heads"), "dim", check_count(dim, "dim"))
        if qk_norm not in ("rms", "layer", None):
            raise ValueError(f'qk_norm must be "rms", "layer" or None, got {qk_norm!r}')
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave at least one hidden channel, got mlp_ratio={mlp_ratio} with dim={dim}")
        self.num_heads, self.qk_norm = num_heads, qk_norm
        head_dim, hidden = dim // num_heads, int(dim * mlp_ratio)
        self.modulation = zero_init(nn.Linear(check_count(condition_dim, "condition_dim"), 6 * dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_weight = nn.Parameter(torch.ones(head_dim)) if qk_norm else None
        self.k_weight = nn.Parameter(torch.ones(head_dim)) if qk_norm else None
        self.attention_out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, x: torch.Tensor, condition: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """x [B, N, C], condition [B, condition_dim], rope (cos, sin) each float32 [N, D/2] or None -> [B, N, C]."""
        modulation = self.modulation(F.silu(condition)).to(x.dtype)  # [B, 6C]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        attended = self._attend(ops.layer_norm_modulate(x, shift_a, scale_a), rope).to(x.dtype)
        x, h = ops.gate_residual_norm_modulate(x, attended, gate_a, shift_m, scale_m)
        return ops.gate_residual(x, self.mlp(h).to(x.dtype), gate_m)

    def _attend(self, h: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        batch, tokens, dim = h.shape
        q, k, v = self.qkv(h).view(batch, tokens, 3, self.num_heads, dim // self.num_heads).unbind(2)  # [B, N, H, D] each
        if self.qk_norm is not None or rope is not None:
            widened = torch.promote_types(q.dtype, torch.float32)
            cos, sin = (None, None) if rope is None else (table.to(widened) for table in rope)
            q, k = ops.qk_norm_rope(q, k, self.q_weight, self.k_weight, cos, sin, norm=self.qk_norm)
        return self.attention_out(ops.attention(q, k, v).reshape(batch, tokens, dim))


class UNetAttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map: x + W attention(GroupNorm(x)); W starts at zero.

    Args:
        channels: channels C, divisible by num_heads and num_groups.
        qk_norm: "rms" normalises q and k per head with a learned weight; None leaves them.
    """

    def __init__(self, channels: int, *, num_heads: int = 1, num_groups: int = 8, qk_norm: str | None = None) -> None:
        super().__init__()
        divides("num_heads", check_count(num_heads, "num_heads"), "channels", check_count(channels, "channels"))
        divides("num_groups", check_count(num_groups, "num_groups"), "channels", channels)
        if qk_norm not in ("rms", None):
            raise ValueError(f'qk_norm must be "rms" or None, got {qk_norm!r}')
        self.num_heads, self.num_groups, self.qk_norm = num_heads, num_groups, qk_norm
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.norm_bias = nn.Parameter(torch.zeros(channels))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_weight = nn.Parameter(torch.ones(channels // num_heads)) if qk_norm else None
        self.k_weight = nn.Parameter(torch.ones(channels // num_heads)) if qk_norm else None
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        batch, channels, height, width = x.shape
        h = ops.group_norm_silu(x, self.num_groups, self.norm_weight, self.norm_bias, activation=None)
        qkv = self.qkv(h.flatten(2).transpose(1, 2))  # [B, N, 3C]
        q, k, v = qkv.view(batch, height * width, 3, self.num_heads, channels // self.num_heads).unbind(2)  # [B, N, H, D] each
        if self.qk_norm is not None:
            q, k = ops.qk_norm_rope(q, k, self.q_weight, self.k_weight, norm=self.qk_norm)
        attended = self.out(ops.attention(q, k, v).reshape(batch, height * width, channels))  # [B, N, C]
        return x + attended.transpose(1, 2).reshape(x.shape).to(x.dtype)


class UNetResBlock(nn.Module):
    """Residual block: x + conv(silu(GN(conv(silu(GN(x)))) (1 + scale) + shift)), (scale, shift) = Linear(silu(condition)).

    The second convolution starts at zero; a 1x1 convolution carries x where the channels change (ADM, Dhariwal and Nichol 2021).
    """

    def __init__(self, in_channels: int, out_channels: int, condition_dim: int, *, num_groups: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        divides("num_groups", check_count(num_groups, "num_groups"), "in_channels", check_count(in_channels, "in_channels"))
        divides("num_groups", num_groups, "out_channels", check_count(out_channels, "out_channels"))
        self.num_groups = num_groups
        self.norm1_weight, self.norm1_bias = nn.Parameter(torch.ones(in_channels)), nn.Parameter(torch.zeros(in_channels))
        self.norm2_weight, self.norm2_bias = nn.Parameter(torch.ones(out_channels)), nn.Parameter(torch.zeros(out_channels))
        self.modulation = nn.Linear(condition_dim, 2 * out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x [B, C_in, H, W], condition [B, condition_dim] -> [B, C_out, H, W]."""
        h = self.conv1(ops.group_norm_silu(x, self.num_groups, self.norm1_weight, self.norm1_bias))
        scale, shift = self.modulation(F.silu(condition)).to(h.dtype).chunk(2, dim=1)  # [B, C_out] each
        h = ops.group_norm_silu(h, self.num_groups, self.norm2_weight, self.norm2_bias, scale, shift)
        return self.skip(x) + self.conv2(self.dropout(h))
