"""Definition: group normalisation with scale, shift and SiLU."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """silu(GN(x) (1 + scale) + shift) for x [B, C, ...]; weight, bias [C]; scale, shift [B, C]. Beside it the groups' means and
    1 / sqrt(variance + eps), [B, num_groups]."""
    dtype = compute_dtype(x)
    # Splitting the channels, and not flattening the positions, keeps a channels_last layout through to the result.
    groups = x.to(dtype).unflatten(1, (num_groups, x.shape[1] // num_groups))  # [B, G, C/G, ...]
    within = tuple(range(2, groups.dim()))
    mean = groups.mean(within, keepdim=True)
    groups = groups - mean
    inverse_deviation = torch.rsqrt(groups.square().mean(within, keepdim=True) + eps)
    y = (groups * inverse_deviation).flatten(1, 2)
    trailing = [1] * (x.dim() - 2)
    if weight is not None:
        y = y * weight.to(dtype).reshape(-1, *trailing)
    if bias is not None:
        y = y + bias.to(dtype).reshape(-1, *trailing)
    if scale is not None:
        y = y * (1 + scale.to(dtype).reshape(*scale.shape, *trailing))
    if shift is not None:
        y = y + shift.to(dtype).reshape(*shift.shape, *trailing)
    y = torch.nn.functional.silu(y) if activation == "silu" else y
    return y.to(x.dtype), mean.flatten(1), inverse_deviation.flatten(1)
