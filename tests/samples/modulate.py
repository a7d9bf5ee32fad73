"""Sample calls of the modulation ops, for the contract that every op is tested against."""

from __future__ import annotations

import torch

B, N, C = 2, 3, 5
EPS = 1e-3


def _normals(shapes, dtype, device):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def _layer_norm_modulate(dtype, device):
    shapes = ([(B, C), (B, C), (2, C)], [(B, 1, C), (B, N, C)], [(C,), (B, C)], [(B, N, C), (C,), (2, C)])
    operands = [_normals([(B, N, C), *modulation], dtype, device) for modulation in shapes]
    return [(*o, EPS) if len(o) == 4 else (*o, None, EPS) for o in operands]


def _rms_norm_modulate(dtype, device):
    x, weight, shift, scale, table = _normals([(B, N, C), (C,), (B, C), (B, N, C), (2, C)], dtype, device)
    return [
        (x, weight, shift, scale, table, EPS),
        (x, weight, shift, scale, None, EPS),
        (x, weight, None, None, None, EPS),
        (x, None, None, shift, table, EPS),
        (x, None, None, None, None, EPS),
    ]


def _gate_residual(dtype, device):
    shapes = (((B, C), (C,)), ((B, 1, C), None), ((B, N, C), (1, C)), ((C,), None))
    operands = [(_normals([(B, N, C), (B, N, C), gate], dtype, device), table) for gate, table in shapes]
    return [(*o, None if table is None else _normals([table], dtype, device)[0]) for o, table in operands]


def _gate_residual_norm_modulate(dtype, device):
    residual, branch, gate, shift, scale, table = _normals([(B, N, C), (B, N, C), *[(B, C)] * 3, (3, C)], dtype, device)
    by_token, shared, by_sample = _normals([(B, N, C), (C,), (B, 1, C)], dtype, device)
    return [
        (residual, branch, gate, shift, scale, table, "layer", EPS),
        (residual, branch, gate, shift, scale, None, "rms", EPS),
        (residual, branch, by_token, shared, by_sample, None, "layer", EPS),
        (residual, branch, None, by_token, by_sample, table[:2], "layer", EPS),
    ]


SAMPLES = {
    "layer_norm_modulate": _layer_norm_modulate,
    "rms_norm_modulate": _rms_norm_modulate,
    "gate_residual": _gate_residual,
    "gate_residual_norm_modulate": _gate_residual_norm_modulate,
}
