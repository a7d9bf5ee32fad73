"""The blocks of U-Nets: attention over the pixels, and convolutions with a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import check_count, check_number, check_positive
from .._checks import check_dtypes, divides, feature_map, vectors
from .._policy import apply, check_policy
from ..embedding import zero_init
from ._parts import attend_to_itself, beside, check_heads, check_qk_norm, pixels, qk_weight


class UNetAttentionBlock(nn.Module):
    """Self-attention over the pixels of a feature map: skip_scale (x + W attention(GroupNorm(x))); W starts at zero.

    With skip_scale 1 the block of ADM (Dhariwal and Nichol, arXiv 2105.05233); with sqrt(1/2) and eps 1e-6 that of the DDPM++ and NCSN++
    networks (Song et al., arXiv 2011.13456) that EDM trains.

    Args:
        channels: channels C, divisible by num_heads and num_groups.
        num_heads: heads, dividing C; D = C / num_heads.
        num_groups: groups of the normalisation, dividing C.
        qk_norm: "rms" normalises q and k per head with a learned weight; None leaves them.
        eps: of the group normalisation.
        skip_scale: factor of the sum.
        policy: "auto", "always" or "never": whether the ops are called under torch.compile; see docs/blocks.md.

    State dict:
        norm_weight, norm_bias [C].
        qkv.weight [3C, C], .bias [3C]: rows ordered (q, k, v), head, channel.
        q_weight, k_weight [D]: with qk_norm alone.
        out.weight [C, C], .bias [C].

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        num_groups: int = 8,
        qk_norm: str | None = None,
        eps: float = 1e-5,
        skip_scale: float = 1.0,
        policy: str = "auto",
    ) -> None:
        super().__init__()
        head_dim = check_heads(num_heads, channels, "channels")
        divides("num_groups", check_count(num_groups, "num_groups"), "channels", channels)
        self.num_heads, self.num_groups, self.qk_norm = num_heads, num_groups, check_qk_norm(qk_norm, ("rms",))
        self.eps, self.skip_scale, self.policy = check_positive(eps, "eps"), check_number(skip_scale, "skip_scale"), check_policy(policy)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_weight, self.k_weight = qk_weight(qk_norm, num_heads, head_dim), qk_weight(qk_norm, num_heads, head_dim)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], contiguous or channels_last -> [B, C, H, W] of x's dtype and layout."""
        feature_map(x, self.qkv.in_features)
        check_dtypes(self.qkv, x=x)
        weight, bias = beside(self.norm_weight, x), beside(self.norm_bias, x)
        h = apply(self.policy, "group_norm_silu", x, self.num_groups, weight, bias, eps=self.eps, activation=None)
        packed = self.qkv(pixels(h))  # [B, N, 3C]
        attended = attend_to_itself(self.policy, packed, self.num_heads, self.qk_norm, self.q_weight, self.k_weight)  # [B, N, C]
        y = x + self.out(attended).transpose(1, 2).reshape(x.shape).to(x.dtype)
        return y if self.skip_scale == 1 else y.mul_(self.skip_scale)


class UNetResBlock(nn.Module):
    """Residual block: x + conv(silu(GN(conv(silu(GN(x)))) (1 + scale) + shift)), (scale, shift) = Linear(silu(condition)).

    The second convolution starts at zero; a 1x1 convolution carries x where the channels change (ADM, Dhariwal and Nichol 2021).

    Args:
        in_channels, out_channels: channels, divisible by num_groups.
        condition_dim: width E of the conditioning vector.
        num_groups: groups of both normalisations.
        dropout: before the second convolution.
        policy: "auto", "always" or "never": whether the ops are called under torch.compile; see docs/blocks.md.

    State dict:
        norm1_weight, norm1_bias [C_in]; norm2_weight, norm2_bias [C_out].
        modulation.weight [2 C_out, E], .bias [2 C_out]: scale, shift.
        conv1.weight [C_out, C_in, 3, 3], .bias [C_out]; conv2.weight [C_out, C_out, 3, 3], .bias [C_out].
        skip.weight [C_out, C_in, 1, 1], .bias [C_out]: where the channels change alone.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        condition_dim: int,
        *,
        num_groups: int = 8,
        dropout: float = 0.0,
        policy: str = "auto",
    ) -> None:
        super().__init__()
        divides("num_groups", check_count(num_groups, "num_groups"), "in_channels", check_count(in_channels, "in_channels"))
        divides("num_groups", num_groups, "out_channels", check_count(out_channels, "out_channels"))
        self.num_groups, self.policy = num_groups, check_policy(policy)
        self.norm1_weight, self.norm1_bias = nn.Parameter(torch.ones(in_channels)), nn.Parameter(torch.zeros(in_channels))
        self.norm2_weight, self.norm2_bias = nn.Parameter(torch.ones(out_channels)), nn.Parameter(torch.zeros(out_channels))
        self.modulation = nn.Linear(check_count(condition_dim, "condition_dim"), 2 * out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C_in, H, W], condition [B, condition_dim] -> [B, C_out, H, W] of x's dtype."""
        feature_map(x, self.conv1.in_channels)
        vectors("condition", condition, x.shape[0], self.modulation.in_features)
        check_dtypes(self.modulation, x=x, condition=condition)
        h = self.conv1(self._normalise(x, self.norm1_weight, self.norm1_bias))
        scale, shift = self.modulation(F.silu(condition)).to(h.dtype).chunk(2, dim=1)  # [B, C_out] each
        h = self._normalise(h, self.norm2_weight, self.norm2_bias, scale, shift)
        return self.skip(x).to(x.dtype) + self.conv2(self.dropout(h)).to(x.dtype)

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor, *modulation: Tensor) -> Tensor:
        return apply(self.policy, "group_norm_silu", x, self.num_groups, beside(weight, x), beside(bias, x), *modulation)
