"""What a score network is told beside the image: noise level, class, position."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from .._checks import check_count
from ._checks import divides

# c_noise = ln(sigma)/4 spans about 3 units; these wavelengths resolve a factor e in sigma and still tell the two ends apart.
_LONGEST_WAVE, _SHORTEST_WAVE = 16.0, 0.5

Projection = TypeVar("Projection", nn.Linear, nn.Conv2d)


class ConditionEmbedding(nn.Module):
    """Embed the noise level and, where there are classes, the label: MLP(fourier(noise_level) + table[class_labels]).

    Args:
        dim: width of the embedding, even.
        num_classes: number of classes; 0 makes an unconditional embedding. Index `num_classes` is the null class.
    """

    def __init__(self, dim: int, num_classes: int = 0) -> None:
        super().__init__()
        divides("2", 2, "dim", check_count(dim, "dim", 2))
        self.num_classes = check_count(num_classes, "num_classes", 0)
        self.dim = dim
        self.class_table = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.hidden, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, noise_level: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """noise_level [B] floating, class_labels int64 [B] or None (the null class) -> [B, dim] of the parameters' dtype."""
        # Made anew, since a buffer would be rounded to the dtype that the network is converted to, and the angles with it.
        waves = torch.logspace(math.log10(_LONGEST_WAVE), math.log10(_SHORTEST_WAVE), self.dim // 2, device=noise_level.device)  # [dim/2]
        wide = torch.promote_types(self.hidden.weight.dtype, torch.float32)
        angles = noise_level.to(wide)[:, None] * (2 * math.pi / waves)  # [B, dim/2]
        embedding = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.hidden.weight.dtype)  # [B, dim]
        if self.class_table is not None:
            embedding = embedding + self.class_table(self._labels(class_labels, noise_level))
        elif class_labels is not None:
            raise ValueError("class_labels were given to a network built with num_classes=0")
        return self.out(F.silu(self.hidden(embedding)))

    def _labels(self, class_labels: torch.Tensor | None, noise_level: torch.Tensor) -> torch.Tensor:
        if class_labels is None:
            return torch.full(noise_level.shape, self.num_classes, dtype=torch.int64, device=noise_level.device)
        if class_labels.dtype != torch.int64:
            raise TypeError(f"class_labels must be int64, got {class_labels.dtype}")
        if class_labels.shape != noise_level.shape:
            raise ValueError(f"class_labels must have shape {list(noise_level.shape)}, got {list(class_labels.shape)}")
        if class_labels.device.type == "cpu" and not torch.compiler.is_compiling() and class_labels.numel():
            low, high = class_labels.aminmax()
            if low < 0 or high > self.num_classes:
                raise ValueError(f"class_labels must lie in [0, {self.num_classes}], got values in [{low}, {high}]")
        return class_labels


def sincos_positions(
    height: int, width: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions [height*width, dim] (row-major); half of dim for the row, half for the column (ViT, MAE)."""
    divides("4", 4, "dim", dim)
    frequencies = 10000.0 ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim // 4))
    rows = torch.arange(height, device=device, dtype=torch.float32)[:, None] * frequencies  # [height, dim/4]
    columns = torch.arange(width, device=device, dtype=torch.float32)[:, None] * frequencies  # [width, dim/4]
    rows = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(height, width, -1)
    columns = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(height, width, -1)
    return torch.cat([rows, columns], dim=2).reshape(height * width, dim).to(dtype)


def axial_rope(
    height: int, width: int, head_dim: int, *, base: float = 100.0, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Axial rotary tables cos, sin, float32 [height*width, head_dim/2]: one half turns with the row, the other with the column."""
    divides("4", 4, "head_dim", head_dim)
    frequencies = base ** (-torch.arange(head_dim // 4, device=device, dtype=torch.float32) / (head_dim // 4))
    rows = (torch.arange(height, device=device, dtype=torch.float32)[:, None] * frequencies)[:, None].expand(height, width, -1)
    columns = (torch.arange(width, device=device, dtype=torch.float32)[:, None] * frequencies)[None].expand(height, width, -1)
    angles = torch.cat([rows, columns], dim=2).reshape(height * width, head_dim // 2)
    return angles.cos(), angles.sin()


def zero_init(module: Projection) -> Projection:
    """Zero a projection, so that the branch it closes starts as nothing."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def full_precision_output(module: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Apply the last projection outside autocast: differences of denoisers cancel, and 16-bit outputs would lose them."""
    weight, bias = module.weight, module.bias
    with torch.autocast(device_type=x.device.type, enabled=False):
        x = x.to(weight.dtype)
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=module.padding)
