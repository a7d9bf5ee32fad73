"""Sample calls of the modulation ops, for the contract that every op is tested against."""

from __future__ import annotations

import torch

B, N, C = 2, 3, 5
EPS = 1e-3


def _normals(shapes, dtype, device):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def _layer_norm_modulate(dtype, device):
    shapes = ([(B, C), (B, C)], [(B, 1, C), (B, N, C)], [(C,), (B, C)])
    return [(*_normals([(B, N, C), *modulation], dtype, device), EPS) for modulation in shapes]


def _rms_norm_modulate(dtype, device):
    x, weight, shift, scale = _normals([(B, N, C), (C,), (B, C), (B, N, C)], dtype, device)
    return [(x, weight, shift, scale, EPS), (x, weight, None, None, EPS), (x, None, None, shift, EPS), (x, None, None, None, EPS)]


def _gate_residual(dtype, device):
    return [tuple(_normals([(B, N, C), (B, N, C), gate], dtype, device)) for gate in ((B, C), (B, 1, C), (B, N, C), (C,))]


def _gate_residual_norm_modulate(dtype, device):
    shapes = ([(B, C)] * 3, [(B, N, C), (C,), (B, 1, C)])
    operands = [_normals([(B, N, C), (B, N, C), *modulation], dtype, device) for modulation in shapes]
    return [(*operands[0], "layer", EPS), (*operands[0], "rms", EPS), (*operands[1], "layer", EPS)]


SAMPLES = {
    "layer_norm_modulate": _layer_norm_modulate,
    "rms_norm_modulate": _rms_norm_modulate,
    "gate_residual": _gate_residual,
    "gate_residual_norm_modulate": _gate_residual_norm_modulate,
}
