"""Normalisation, modulation and gated residuals at the rows of DiT-XL/2, PixArt and EDM's transformer-like blocks."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm, rms_norm

from benchmarks import rivals
from benchmarks.shapes import ROWS
from benchmarks.workloads import Workload
from fastdiff_kernels import ops

EPS = 1e-6


def layer_norm_modulate(x, shift, scale):
    return layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def rms_norm_modulate(x, shift, scale):
    return rms_norm(x, x.shape[-1:], eps=EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gate_residual(residual, branch, gate):
    return residual + gate.unsqueeze(1) * branch


def gate_residual_norm_modulate(residual, branch, gate, shift, scale):
    hidden = gate_residual(residual, branch, gate)
    return hidden, layer_norm_modulate(hidden, shift, scale)


def modulated(norm):
    """A library's normalisation, modulated by PyTorch."""
    return lambda x, shift, scale: norm(x, EPS) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated(norm):
    """A gated residual by PyTorch, normalised by a library."""

    def run(residual, branch, gate, shift, scale):
        hidden = gate_residual(residual, branch, gate)
        return hidden, modulated(norm)(hidden, shift, scale)

    return run


RIVALS = {
    "layer_norm_modulate": rivals.of("layer_norm", modulated),
    "rms_norm_modulate": rivals.of("rms_norm", modulated),
    "gate_residual_norm_modulate": rivals.of("layer_norm", gated),
}

# Name: eager, ours, how many activations, how many modulations.
OPS = {
    "layer_norm_modulate": (layer_norm_modulate, ops.layer_norm_modulate, 1, 2),
    "rms_norm_modulate": (rms_norm_modulate, lambda x, shift, scale: ops.rms_norm_modulate(x, None, shift, scale), 1, 2),
    "gate_residual": (gate_residual, ops.gate_residual, 2, 1),
    "gate_residual_norm_modulate": (gate_residual_norm_modulate, ops.gate_residual_norm_modulate, 2, 3),
}


def operands(shape: tuple[int, int, int], activations: int, modulations: int) -> list[torch.Tensor]:
    """Activations, and views of one modulation tensor as a network's chunk(6) gives them."""
    modulation = torch.randn(shape[0], 6 * shape[2]).chunk(6, dim=1)  # [B, C] each, strided
    return [*(torch.randn(shape) for _ in range(activations)), *modulation[:modulations]]


WORKLOADS = [
    Workload(
        name,
        network,
        shape,
        lambda shape=shape, a=activations, m=modulations: operands(shape, a, m),
        eager,
        ours,
        gradients=tuple(range(activations + modulations)),
        # Inductor sums the modulation's gradients over the rows less exactly than eager does.
        factor=8.0,
        **RIVALS.get(name, {}),
    )
    for network, shape in ROWS.items()
    for name, (eager, ours, activations, modulations) in OPS.items()
]


def test_speed(case, measure):
    measure(case)
