"""Normalisation, modulation and gated residuals at the shapes of DiT-XL/2 (256 tokens) and DiT-S/2."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from benchmarks.harness import forward_backward
from fastdiff_kernels import ops

SHAPES = ((4, 256, 1152), (2, 1024, 384))
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


CASES = {
    "layer_norm_modulate": (layer_norm_modulate, ops.layer_norm_modulate, 1, 2),
    "rms_norm_modulate": (rms_norm_modulate, lambda x, shift, scale: ops.rms_norm_modulate(x, None, shift, scale), 1, 2),
    "gate_residual": (gate_residual, ops.gate_residual, 2, 1),
    "gate_residual_norm_modulate": (gate_residual_norm_modulate, ops.gate_residual_norm_modulate, 2, 3),
}


def operands(shape: tuple[int, int, int], samples: int, modulations: int) -> list[torch.Tensor]:
    """`samples` tensors of the shape, and views of one modulation tensor as a network's chunk(6) gives them."""
    torch.manual_seed(0)
    modulation = torch.randn(shape[0], 6 * shape[2]).chunk(6, dim=1)  # [B, C] each, strided
    return [*(torch.randn(shape) for _ in range(samples)), *modulation[:modulations]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward(compare, name, shape):
    eager, ours, samples, modulations = CASES[name]
    args = operands(shape, samples, modulations)
    compiled = torch.compile(eager, dynamic=False)
    truth = eager(*[a.double() for a in args])
    variants = {"eager": lambda: eager(*args), "compile": lambda: compiled(*args), "ours": lambda: ours(*args)}
    compare(f"{name} {shape}", "forward", variants, (truth,) if isinstance(truth, torch.Tensor) else truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_backward(compare, name, shape):
    eager, ours, samples, modulations = CASES[name]
    args = [a.requires_grad_() for a in operands(shape, samples, modulations)]
    upstream = [torch.randn(shape) for _ in range(2 if name == "gate_residual_norm_modulate" else 1)]
    exact = forward_backward(eager, [a.detach().double().requires_grad_() for a in args], [u.double() for u in upstream])
    variants = {
        "eager": forward_backward(eager, args, upstream),
        "compile": forward_backward(torch.compile(eager, dynamic=False), args, upstream),
        "ours": forward_backward(ours, args, upstream),
    }
    # Inductor sums the modulation's gradients over the rows less exactly than eager does.
    compare(f"{name} {shape}", "fwd+bwd", variants, exact(), factor=8.0)
