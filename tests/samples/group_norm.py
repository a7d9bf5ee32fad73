"""Sample calls of group normalisation, for the contract that every op is tested against."""

from __future__ import annotations

import torch

EPS = 1e-3


def _normals(shapes, dtype, device):
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def _group_norm_silu(dtype, device):
    x, weight, bias, scale, shift = _normals([(2, 6, 3, 3), (6,), (6,), (2, 6), (2, 6)], dtype, device)
    rows = x[:, :, 0]
    return [
        (x, 2, weight, bias, scale, shift, EPS, "silu"),
        (x.contiguous(memory_format=torch.channels_last), 3, weight, bias, scale, shift, EPS, "silu"),
        (rows, 2, None, bias, scale, None, EPS, "silu"),
        (x, 1, weight, bias, None, None, EPS, None),
    ]


SAMPLES = {"group_norm_silu": _group_norm_silu}
