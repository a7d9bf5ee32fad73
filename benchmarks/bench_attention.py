"""Attention at the shapes of a small network on 8x8 images and of DiT-XL/2 on 256 tokens, beside PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import forward_backward
from fastdiff_kernels import ops

SHAPES = ((128, 64, 4, 16), (128, 16, 4, 32), (4, 256, 16, 72))


def eager(packed):
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def sdpa(packed):
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in packed.unbind(2))).transpose(1, 2)


def ours(packed):
    return ops.attention(*packed.unbind(2))


@pytest.mark.parametrize("mode", ["forward", "fwd+bwd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(compare, shape, mode):
    batch, rows, heads, width = shape
    packed, upstream = torch.randn(batch, rows, 3, heads, width), torch.randn(shape)
    fns = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "sdpa": sdpa, "ours": ours}
    exact = packed.double()
    if mode == "forward":
        variants, truth = {name: lambda fn=fn: fn(packed) for name, fn in fns.items()}, (eager(exact),)
    else:
        packed.requires_grad_()
        variants = {name: forward_backward(fn, [packed], [upstream]) for name, fn in fns.items()}
        truth = forward_backward(eager, [exact.requires_grad_()], [upstream.double()])()
    compare(f"attention {shape}", mode, variants, truth, factor=4.0)
