"""Criteria of AdaptiveDiffusion on latents: a batch of Stable Diffusion's, one of 256 x 256 pixels."""

from __future__ import annotations

import pytest
import torch

from fastdiff_kernels import ops

SHAPES = ((4, 4, 64, 64), (4, 3, 256, 256))


def third_order_difference(x0, x1, x2, x3):
    return (x3 - 3 * x2 + 3 * x1 - x0).abs().flatten(1).mean(1), (x3 - x2).abs().flatten(1).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_third_order_difference(compare, shape, dtype):
    latents = [torch.randn(shape).to(dtype) for _ in range(4)]
    compiled = torch.compile(third_order_difference, dynamic=False)
    truth = third_order_difference(*[x.double() for x in latents])
    variants = {
        "eager": lambda: third_order_difference(*latents),
        "compile": lambda: compiled(*latents),
        "ours": lambda: ops.third_order_difference(*latents),
    }
    # Inductor sums less exactly than eager does.
    compare(f"third_order_difference {shape} {dtype}", "forward", variants, truth, factor=8.0)


def test_third_order_skip(compare):
    """One decision a step for a batch of 64: the time is that of the call."""
    d0, d1, d2 = (torch.rand(64) for _ in range(3))
    threshold = torch.tensor([0.01])

    def skip(d0, d1, d2):
        return ((d0 + d2) / 2 - d1).abs() <= threshold * d1

    compiled = torch.compile(skip, dynamic=False)
    variants = {
        "eager": lambda: skip(d0, d1, d2),
        "compile": lambda: compiled(d0, d1, d2),
        "ours": lambda: ops.third_order_skip(d0, d1, d2, threshold),
    }
    compare("third_order_skip (64,)", "forward", variants, (skip(d0, d1, d2).double(),))
