"""A diffusion transformer for small images."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .._checks import check_count
from ._checks import divides, network_input
from ._policy import apply, check_policy
from .blocks import DiTBlock
from .embedding import ConditionEmbedding, axial_rope, full_precision_output, sincos_positions, zero_init


class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero blocks (Peebles and Xie 2022); `network(x, noise_level, class_labels=None)`.

    Args:
        in_channels: image channels; out_channels defaults to it.
        patch_size: side of the square patches; H and W must be multiples of it.
        dim, depth, num_heads, mlp_ratio: size of the transformer; num_heads divides dim.
        num_classes: 0 for an unconditional network; otherwise label `num_classes` (or None) is the null class.
        positions: "sincos" (fixed, any image size), "learned" (needs image_size) or "none" (with rope).
        image_size: height and width (or one int) that learned positions are made for.
        rope: rotate q and k with axial rotary positions; the head dimension must be divisible by 4.
        qk_norm: "rms", "layer" or None.
        policy: "auto", "always" or "never": whether the ops are called under torch.compile; see docs/blocks.md.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        patch_size: int = 2,
        dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        positions: str = "sincos",
        image_size: int | tuple[int, int] | None = None,
        rope: bool = False,
        qk_norm: str | None = None,
        out_channels: int | None = None,
        policy: str = "auto",
    ) -> None:
        super().__init__()
        self.in_channels = check_count(in_channels, "in_channels")
        self.out_channels = check_count(in_channels if out_channels is None else out_channels, "out_channels")
        self.patch_size = check_count(patch_size, "patch_size")
        self.dim, self.num_classes, self.rope, self.policy = dim, num_classes, rope, check_policy(policy)
        divides("num_heads", check_count(num_heads, "num_heads"), "dim", check_count(dim, "dim"))
        self.head_dim = dim // num_heads
        if rope:
            divides("4", 4, "dim / num_heads", self.head_dim)
        if positions not in ("sincos", "learned", "none"):
            raise ValueError(f'positions must be "sincos", "learned" or "none", got {positions!r}')
        if positions == "sincos":
            divides("4", 4, "dim", dim)
        if (positions == "learned") != (image_size is not None):
            raise ValueError(
                f'image_size must be given exactly when positions is "learned", got positions={positions!r}, image_size={image_size!r}'
            )
        self.positions = positions
        self.grid = self._grid(image_size) if image_size is not None else None
        self.position_table = nn.Parameter(0.02 * torch.randn(self.grid[0] * self.grid[1], dim)) if self.grid else None
        self.patch_in = nn.Linear(in_channels * patch_size**2, dim)
        self.embedding = ConditionEmbedding(dim, num_classes)
        self.blocks = nn.ModuleList(
            DiTBlock(dim, num_heads, dim, mlp_ratio=mlp_ratio, qk_norm=qk_norm, policy=policy) for _ in range(check_count(depth, "depth"))
        )
        self.modulation = zero_init(nn.Linear(dim, 2 * dim))
        self.patch_out = zero_init(nn.Linear(dim, self.out_channels * patch_size**2))

    def _grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        divides("patch_size", self.patch_size, "image_size", check_count(height, "image_size"))
        divides("patch_size", self.patch_size, "image_size", check_count(width, "image_size"))
        return height // self.patch_size, width // self.patch_size

    def forward(self, x: torch.Tensor, noise_level: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """Raw network output.

        Args:
            x: [B, in_channels, H, W] of the parameters' dtype, already scaled by c_in; H, W divisible by patch_size.
            noise_level: floating [B], c_noise = ln(sigma)/4 (EDM).
            class_labels: int64 [B] in [0, num_classes], or None.

        Returns:
            [B, out_channels, H, W], in the parameters' dtype under autocast too.
        """
        network_input(x, noise_level, self.in_channels, self.patch_size, self.patch_in)
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        if self.grid is not None and self.grid != (rows, columns):
            raise ValueError(f"x must have the {self.grid[0]}x{self.grid[1]} patches that positions were learned for, got {rows}x{columns}")
        condition = self.embedding(noise_level, class_labels)  # [B, C]
        h = self.patch_in(self._patches(x, rows, columns))  # [B, N, C]
        if self.positions == "sincos":
            h = h + sincos_positions(rows, columns, self.dim, device=h.device, dtype=h.dtype)
        elif self.position_table is not None:
            h = h + self.position_table.to(h.dtype)
        rope = axial_rope(rows, columns, self.head_dim, device=h.device) if self.rope else None
        dtype = h.dtype
        for block in self.blocks:
            h = block(h, condition, rope, carry=True)
        shift, scale = self.modulation(F.silu(condition)).to(dtype).chunk(2, dim=1)
        _, h = apply(self.policy, "gate_residual_norm_modulate", *h, shift, scale)
        patches = full_precision_output(self.patch_out, h)  # [B, N, out * patch^2]
        return self._image(patches, rows, columns)

    # Not pixel_shuffle and pixel_unshuffle, which get the shape of an empty batch wrong.
    def _patches(self, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        batch, channels, side = x.shape[0], x.shape[1], self.patch_size
        return (
            x.reshape(batch, channels, rows, side, columns, side)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(batch, rows * columns, channels * side**2)
        )

    def _image(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        batch, side = patches.shape[0], self.patch_size
        pixels = patches.view(batch, rows, columns, self.out_channels, side, side).permute(0, 3, 1, 4, 2, 5)
        return pixels.reshape(batch, self.out_channels, rows * side, columns * side)
