"""Attention and its forward mode at the shapes of networks, from one projection, beside PyTorch's own."""

from __future__ import annotations

import torch

from benchmarks import rivals
from benchmarks.workloads import Workload
from fastdiff_kernels import ops
from fastdiff_kernels._registry import OPS

# Batch, queries, heads, width.
NETWORKS = {
    "EDM-16": (16, 256, 1, 256),
    "EDM-8": (16, 64, 1, 256),
    "ADM-32": (1, 1024, 6, 64),
    "EDM2-XS": (16, 256, 6, 64),
    "DiT-XL/2": (4, 256, 16, 72),
    "PixArt-512": (1, 1024, 16, 72),
    "SD1.5-32": (1, 1024, 8, 80),
}


def eager(packed):
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def ours(packed):
    return ops.attention(*packed.unbind(2))


def flops(packed):
    q, k, v = packed.unbind(2)
    return OPS["attention"].flops(q, k, v)


def tangent_of_eager(packed, t_packed):
    return torch.func.jvp(eager, (packed,), (t_packed,))


def both(packed, t_packed):
    output, _, t_output, _ = ops.attention_dual(*packed.unbind(2), *t_packed.unbind(2))
    return output, t_output


def attention_workload(network, shape):
    batch, rows, heads, width = shape
    return Workload(
        "attention", network, shape, lambda: [torch.randn(batch, rows, 3, heads, width)], eager, ours, gradients=(0,),
        **rivals.attention(lambda packed: packed.unbind(2)), flops=flops, backward_flops=2.5, factor=4.0,
    )  # fmt: skip


def dual_workload(network, shape):
    batch, rows, heads, width = shape
    return Workload(
        "attention_dual", network, shape, lambda: [torch.randn(batch, rows, 3, heads, width) for _ in range(2)],
        tangent_of_eager, both, flops=lambda packed, _: 3 * flops(packed), factor=4.0, compiled=False,
    )  # fmt: skip


WORKLOADS = [
    *(attention_workload(network, shape) for network, shape in NETWORKS.items()),
    dual_workload("DiT-XL/2", NETWORKS["DiT-XL/2"]),
]


def test_speed(case, measure):
    measure(case)
