"""Sampling steps on latents of Stable Diffusion's size and on CIFAR-10 images."""

from __future__ import annotations

import pytest
import torch

from fastdiff_kernels import ops
from fastdiff_kernels.reference.philox import normals

# torch.compile adds a sample's terms in fewer lanes than eager, which is nearer the truth by up to this factor.
TOLERANCE = 4.0
SHAPES = ((128, 3, 32, 32), (16, 4, 64, 64))
SIGMA, SIGMA_NEXT, GUIDANCE, SEED = 2.0, 1.5, 4.0, 7


def guided_step(x, denoised, uncond):
    guided = uncond + GUIDANCE * (denoised - uncond)
    following = x + (SIGMA_NEXT - SIGMA) * ((x - guided) / SIGMA)
    return following, (following - x).abs().flatten(1).mean(1)


def posterior_sample(denoised, noisy, noise):
    ratio = (SIGMA_NEXT / SIGMA) ** 2
    return ratio * noisy + (1 - ratio) * denoised + SIGMA_NEXT * (1 - ratio) ** 0.5 * noise


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_guided_step(compare, shape):
    operands = [torch.randn(shape) for _ in range(3)]
    x, denoised, uncond = operands
    compiled = torch.compile(guided_step, dynamic=False)
    variants = {
        "eager": lambda: guided_step(*operands),
        "compile": lambda: compiled(*operands),
        "ours": lambda: ops.guided_step(x, denoised, SIGMA, SIGMA_NEXT, uncond=uncond, guidance=GUIDANCE),
    }
    compare(f"guided_step {shape}", "forward", variants, guided_step(*[o.double() for o in operands]), factor=TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_posterior_sample(compare, shape):
    """Eager and compiled read noise that was drawn before, at no cost here; ours draws it."""
    noise = normals(torch.Size(shape), SEED, 0, "posterior", torch.device("cpu"))
    operands = [torch.randn(shape), torch.randn(shape), noise]
    compiled = torch.compile(posterior_sample, dynamic=False)
    variants = {
        "eager": lambda: posterior_sample(*operands),
        "compile": lambda: compiled(*operands),
        "ours": lambda: ops.posterior_sample(operands[0], operands[1], SIGMA_NEXT, SIGMA, SEED),
    }
    compare(f"posterior_sample {shape}", "forward", variants, (posterior_sample(*[o.double() for o in operands]),), factor=TOLERANCE)
