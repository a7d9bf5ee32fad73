"""Score matching losses on batches of CIFAR-10 images and of 64 x 64 latents."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import forward_backward
from fastdiff_kernels import ops

# torch.compile adds a sample's terms in fewer lanes than eager, which is nearer the truth by up to this factor.
TOLERANCE = 4.0
SHAPES = ((128, 3, 32, 32), (16, 4, 64, 64))
SIGMA, SEED = 0.5, 7


def denoising_loss(denoised, clean):
    return (denoised - clean).square().flatten(1).sum(1)


def lcss_loss(score, noise):
    return (score * noise).flatten(1).sum(1) / SIGMA + 0.5 * score.square().flatten(1).sum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("eager", "ours"), [(denoising_loss, ops.denoising_loss), (lcss_loss, lambda s, z: ops.lcss_loss(s, z, SIGMA))])
def test_losses_forward_backward(compare, eager, ours, shape):
    network_output, target, upstream = torch.randn(shape), torch.randn(shape), torch.randn(shape[0])

    def variant(fn, dtype=torch.float32):
        leaf, other = network_output.to(dtype, copy=True).requires_grad_(), target.to(dtype)
        return forward_backward(lambda out: fn(out, other), [leaf], [upstream.to(dtype)])

    variants = {"eager": variant(eager), "compile": variant(torch.compile(eager, dynamic=False)), "ours": variant(ours)}
    compare(f"{eager.__name__} {shape}", "fwd+bwd", variants, variant(eager, torch.float64)(), factor=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_seeded_lcss_forward_backward(compare, shape):
    """Eager and compiled read noise drawn before, at no cost here; ours draws it forward and backward, and stores nothing."""
    score, upstream = torch.randn(shape), torch.randn(shape[0])
    noise = ops.lcss_noise(score, SEED)

    def variant(fn, dtype=torch.float32):
        return forward_backward(fn, [score.to(dtype, copy=True).requires_grad_()], [upstream.to(dtype)])

    compiled = torch.compile(lcss_loss, dynamic=False)
    variants = {
        "eager": variant(lambda s: lcss_loss(s, noise)),
        "compile": variant(lambda s: compiled(s, noise)),
        "ours": variant(lambda s: ops.lcss_loss(s, SEED, SIGMA)),
    }
    compare(
        f"lcss_loss, seeded {shape}",
        "fwd+bwd",
        variants,
        variant(lambda s: lcss_loss(s, noise.double()), torch.float64)(),
        factor=TOLERANCE,
    )
