"""A U-Net score network for small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .._checks import check_count
from ._checks import divides, network_input
from ._policy import apply, check_policy
from .blocks import UNetAttentionBlock, UNetResBlock
from .blocks._parts import beside
from .embedding import ConditionEmbedding, full_precision_output, zero_init


class _Stage(nn.Module):
    """Resample, append the skip, residual block, attention."""

    def __init__(self, block: UNetResBlock, attention: UNetAttentionBlock | None, resample: str | None = None) -> None:
        super().__init__()
        self.block, self.attention, self.resample = block, attention, resample

    def forward(self, x: torch.Tensor, condition: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.block(x if skip is None else torch.cat([x, skip], dim=1), condition)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """Noise- and class-conditional U-Net; `network(x, noise_level, class_labels=None)`.

    Residual blocks with scale/shift conditioning, self-attention at the lowest resolution (and in the levels asked for),
    average-pool and nearest-neighbour resampling, concatenated skips. Its output starts at zero.

    Args:
        in_channels: image channels; out_channels defaults to it.
        channels: width of the first level.
        multipliers: width of each level over `channels`; the image is halved between levels.
        blocks: residual blocks a level on the way down (one more on the way up).
        attention_levels: levels (0 the finest) with attention after each block, beside the middle, which always has it.
        num_heads, num_groups: of the attention and of the group norms; they must divide every width.
        num_classes: 0 for an unconditional network; otherwise label `num_classes` (or None) is the null class.
        condition_dim: width of the noise/class embedding, even; 4 * channels unless given.
        qk_norm: "rms" or None, for the attention.
        dropout: before the second convolution of each residual block.
        policy: "auto", "always" or "never": whether the ops are called under torch.compile; see docs/blocks.md.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention_levels: Sequence[int] = (),
        num_heads: int = 2,
        num_groups: int = 8,
        num_classes: int = 0,
        condition_dim: int | None = None,
        qk_norm: str | None = None,
        dropout: float = 0.0,
        out_channels: int | None = None,
        policy: str = "auto",
    ) -> None:
        super().__init__()
        self.in_channels = check_count(in_channels, "in_channels")
        out_channels = check_count(in_channels if out_channels is None else out_channels, "out_channels")
        divides("num_groups", check_count(num_groups, "num_groups"), "channels", check_count(channels, "channels"))
        check_count(blocks, "blocks")
        if not multipliers:
            raise ValueError("multipliers must name at least one level, got an empty sequence")
        widths = [channels * check_count(m, "multipliers") for m in multipliers]
        if any(level not in range(len(widths)) for level in attention_levels):
            raise ValueError(f"attention_levels must lie in [0, {len(widths) - 1}], got {tuple(attention_levels)}")
        condition_dim = check_count(4 * channels if condition_dim is None else condition_dim, "condition_dim", 2)
        divides("2", 2, "condition_dim", condition_dim)
        self.num_classes = num_classes
        self.downsampling = 2 ** (len(widths) - 1)
        self.num_groups, self.policy = num_groups, check_policy(policy)
        self.embedding = ConditionEmbedding(condition_dim, num_classes)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)

        def stage(c_in: int, c_out: int, attends: bool, resample: str | None = None) -> _Stage:
            block = UNetResBlock(c_in, c_out, condition_dim, num_groups=num_groups, dropout=dropout, policy=policy)
            if not attends:
                return _Stage(block, None, resample)
            attention = UNetAttentionBlock(c_out, num_heads=num_heads, num_groups=num_groups, qk_norm=qk_norm, policy=policy)
            return _Stage(block, attention, resample)

        skips, width = [channels], channels
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, level_width in enumerate(widths):
            for index in range(blocks):
                self.down.append(stage(width, level_width, level in attention_levels, "down" if level and index == 0 else None))
                width = level_width
                skips.append(width)
        self.middle = nn.ModuleList([stage(width, width, True), stage(width, width, False)])
        for level, level_width in reversed(list(enumerate(widths))):
            for index in range(blocks + (level == 0)):
                resample = "up" if level < len(widths) - 1 and index == 0 else None
                self.up.append(stage(width + skips.pop(), level_width, level in attention_levels, resample))
                width = level_width
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.conv_out = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: torch.Tensor, noise_level: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Raw network output.

        Args:
            x: [B, in_channels, H, W] of the parameters' dtype, already scaled by c_in; H, W divisible by `downsampling`.
            noise_level: floating [B], c_noise = ln(sigma)/4 (EDM).
            class_labels: int64 [B] in [0, num_classes], or None.

        Returns:
            [B, out_channels, H, W], in the parameters' dtype under autocast too.
        """
        network_input(x, noise_level, self.in_channels, self.downsampling, self.conv_in)
        condition = self.embedding(noise_level, class_labels)
        h = self.conv_in(x)
        skips = [h]
        for stage in self.down:
            h = stage(h, condition)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, condition)
        for stage in self.up:
            h = stage(h, condition, skips.pop())
        h = apply(self.policy, "group_norm_silu", h, self.num_groups, beside(self.norm_weight, h), beside(self.norm_bias, h))
        return full_precision_output(self.conv_out, h)
