"""Query and key normalisation with rotary embedding at the shapes of a small network on 8x8 images and of DiT-XL/2 on 256 tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import forward_backward
from fastdiff_kernels import ops

SHAPES = ((128, 64, 4, 16), (4, 256, 16, 72))
EPS = 1e-6


def rotated(x, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def eager(packed, q_weight, k_weight, cos, sin):
    q, k, _ = packed.unbind(2)
    return tuple(rotated(F.rms_norm(x, x.shape[-1:], w, EPS), cos, sin) for x, w in ((q, q_weight), (k, k_weight)))


def ours(packed, q_weight, k_weight, cos, sin):
    q, k, _ = packed.unbind(2)
    return ops.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps=EPS)


@pytest.mark.parametrize("mode", ["forward", "fwd+bwd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qk_norm_rope(compare, shape, mode):
    batch, rows, heads, width = shape
    angle = torch.randn(rows, width // 2)
    leaves, angles = [torch.randn(batch, rows, 3, heads, width), torch.randn(width), torch.randn(width)], [angle.cos(), angle.sin()]
    fns = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "ours": ours}
    exact, exact_angles = [t.double() for t in leaves], [t.double() for t in angles]
    if mode == "forward":
        variants, truth = {name: lambda fn=fn: fn(*leaves, *angles) for name, fn in fns.items()}, eager(*exact, *exact_angles)
    else:
        upstream = [torch.randn(shape) for _ in range(2)]
        for t in (*leaves, *exact):
            t.requires_grad_()
        variants = {name: forward_backward(lambda *a, fn=fn: fn(*a, *angles), leaves, upstream) for name, fn in fns.items()}
        truth = forward_backward(lambda *a: eager(*a, *exact_angles), exact, [u.double() for u in upstream])()
    # Inductor sums the weights' gradients over thousands of tokens in one chain, some twenty times less exactly than eager.
    compare(f"qk_norm_rope {shape}", mode, variants, truth, factor=32.0)
