"""Attention from one projection, its forward mode, and attention to captions at the shapes of networks, beside PyTorch's own."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks import rivals
from benchmarks.shapes import ATTENTION, CROSS
from benchmarks.workloads import Workload
from fastdiff_kernels import ops
from fastdiff_kernels._registry import OPS

# Queries beyond which a user of eager PyTorch has to go head by head, and through the queries in parts.
LONG = 8192


def softmax_attention(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v).transpose(1, 2)


def eager(packed):
    return softmax_attention(*packed.unbind(2))


def eager_in_parts(packed):
    heads = [
        torch.cat([softmax_attention(part, k, v) for part in q.split(LONG, 1)], 1)
        for q, k, v in (head.unbind(2) for head in packed.split(1, 3))
    ]
    return torch.cat(heads, 2)


def cross_eager(q, packed):
    return softmax_attention(q, *packed.unbind(2))


def cross_ours(q, packed):
    return ops.attention(q, *packed.unbind(2))


def padding(packed, key_lengths):
    return torch.arange(packed.shape[1], device=packed.device) >= key_lengths[:, None, None, None]  # [B, 1, 1, M]


def padded_eager(q, packed, key_lengths):
    q, k, v = (t.transpose(1, 2) for t in (q, *packed.unbind(2)))
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(padding(packed, key_lengths), -torch.inf)
    return (torch.softmax(logits, -1) @ v).transpose(1, 2)


def padded_sdpa(q, packed, key_lengths):
    q, k, v = (t.transpose(1, 2) for t in (q, *packed.unbind(2)))
    return F.scaled_dot_product_attention(q, k, v, ~padding(packed, key_lengths)).transpose(1, 2)


def padded_ours(q, packed, key_lengths):
    return ops.attention(q, *packed.unbind(2), key_lengths=key_lengths)


def ours(packed):
    return ops.attention_packed(packed)


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
    long = rows > LONG
    return Workload(
        "attention_packed", network, shape, lambda: [torch.randn(batch, rows, 3, heads, width)], eager_in_parts if long else eager, ours,
        gradients=() if long else (0,), compiled=not long,
        **rivals.attention(lambda packed: packed.unbind(2)), flops=flops, backward_flops=2.5, factor=4.0,
    )  # fmt: skip


def dual_workload(network, shape):
    batch, rows, heads, width = shape
    return Workload(
        "attention_dual", network, shape, lambda: [torch.randn(batch, rows, 3, heads, width) for _ in range(2)],
        tangent_of_eager, both, flops=lambda packed, _: 3 * flops(packed), factor=4.0,
    )  # fmt: skip


def cross_workload(network, shape, keys):
    batch, rows, heads, width = shape
    return Workload(
        "attention", network, f"{batch}x{rows}x{heads}x{width}, {keys} keys",
        lambda: [torch.randn(shape), torch.randn(batch, keys, 2, heads, width)], cross_eager, cross_ours, gradients=(0, 1),
        **rivals.attention(lambda q, packed: (q, *packed.unbind(2))), flops=lambda q, packed: 4 * q.numel() * keys,
        backward_flops=2.5, factor=4.0,
    )  # fmt: skip


def padded_workload(network, shape, keys):
    """Captions shorter than their tensor. What ours leaves out eager computes, so that operations are not counted."""
    batch, rows, heads, width = shape
    return Workload(
        "attention", network, f"{batch}x{rows}x{heads}x{width}, {keys} keys, padded",
        lambda: [torch.randn(shape), torch.randn(batch, keys, 2, heads, width), torch.arange(keys // 2, keys // 2 + batch)],
        padded_eager, padded_ours, gradients=(0, 1), rivals={"sdpa": padded_sdpa}, factor=4.0,
    )  # fmt: skip


WORKLOADS = [
    *(attention_workload(network, shape) for network, shape in ATTENTION.items()),
    dual_workload("DiT-XL/2", ATTENTION["DiT-XL/2"]),
    *(workload(network, *size) for network, size in CROSS.items() for workload in (cross_workload, padded_workload)),
]


def test_speed(case, measure):
    measure(case)
