"""The losses of SIM and moment matching on batches of CIFAR-10 images and of 64 x 64 latents."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import forward_backward
from fastdiff_kernels import ops

# torch.compile adds a sample's terms in fewer lanes than eager, which is nearer the truth by up to this factor.
TOLERANCE = 4.0
SHAPES = ((128, 3, 32, 32), (16, 4, 64, 64))


def sim_loss(fake, teacher, sample):
    gap = fake - teacher
    return -(gap * (fake - sample)).flatten(1).sum(1) / (gap.square().flatten(1).sum(1) + 1e-6).sqrt()


def moment_matching_loss(sample, auxiliary, teacher):
    return (sample * (auxiliary - teacher).detach()).flatten(1).sum(1)


def auxiliary_loss(sample, auxiliary, teacher):
    return ((sample - auxiliary).square() + (teacher - auxiliary).square()).flatten(1).sum(1)


# Name: eager, ours, which of the three operands are differentiated.
CASES = {
    "sim_loss": (sim_loss, lambda *args: ops.sim_loss(*args, c=1e-3), (0, 1, 2)),
    "moment_matching_loss": (moment_matching_loss, ops.moment_matching_loss, (0,)),
    "moment_matching_auxiliary_loss": (auxiliary_loss, ops.moment_matching_auxiliary_loss, (1,)),
}


def of_leaves(fn, operands, places):
    """fn as a function of the operands at those places."""

    def call(*leaves):
        full = list(operands)
        for place, leaf in zip(places, leaves, strict=True):
            full[place] = leaf
        return fn(*full)

    return call


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_backward(compare, name, shape):
    eager, ours, places = CASES[name]
    operands, upstream = [torch.randn(shape) for _ in range(3)], torch.randn(shape[0])

    def variant(fn, dtype=torch.float32):
        wide = [o.to(dtype) for o in operands]
        leaves = [wide[place].requires_grad_() for place in places]
        return forward_backward(of_leaves(fn, wide, places), leaves, [upstream.to(dtype)])

    variants = {"eager": variant(eager), "compile": variant(torch.compile(eager, dynamic=False)), "ours": variant(ours)}
    compare(f"{name} {shape}", "fwd+bwd", variants, variant(eager, torch.float64)(), factor=TOLERANCE)
