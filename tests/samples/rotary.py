"""Sample calls of query and key normalisation, for the contract that every op is tested against."""

from __future__ import annotations

import torch

B, N, H, D = 2, 3, 2, 4
EPS = 1e-3


def _qk_norm_rope(dtype, device):
    generator = torch.Generator().manual_seed(17)
    shapes = ((B, N, H, D), (B, N, H, D), (D,), (D,), (H * D,), (H * D,), (N, D // 2), (B, N, D // 2))
    q, k, q_weight, k_weight, q_heads, k_heads, angle, angles = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes
    )
    return [
        (q, k, q_weight, k_weight, angle.cos(), angle.sin(), "rms", "interleaved", EPS),
        (q, k, q_heads, k_heads, angles.cos(), angles.sin(), "layer_heads", "half", EPS),
        (q, k[:, :2], q_weight, None, None, None, "layer", "interleaved", EPS),
        (q, k, None, None, angle.cos(), angle.sin(), "pixel", "half", EPS),
    ]


def _qkv_pixel_norm(dtype, device):
    generator = torch.Generator().manual_seed(18)
    packed = torch.randn(B, H, D, 3, N, generator=generator, dtype=torch.float64).to(device, dtype)
    q, k, v = packed.permute(3, 0, 4, 1, 2).unbind(0)
    return [(q, k, v, EPS), (q.contiguous(), k[:, :2].contiguous(), v[:, :2].contiguous(), EPS)]


def _pixel_norm(dtype, device):
    x = torch.randn(B, 3, N, H, D, generator=torch.Generator().manual_seed(19), dtype=torch.float64).to(device, dtype)
    return [(x.transpose(1, 2).flatten(2, 3), EPS), (x[:, 1], EPS)]


SAMPLES = {"qk_norm_rope": _qk_norm_rope, "pixel_norm": _pixel_norm, "qkv_pixel_norm": _qkv_pixel_norm}
