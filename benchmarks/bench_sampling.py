"""Sampling steps on CIFAR-10 images and on latents of Stable Diffusion's size; drawing the posterior's noise is part of its step."""

from __future__ import annotations

import torch

from benchmarks.workloads import Workload
from fastdiff_kernels import ops
from fastdiff_kernels.reference.philox import normals

SHAPES = {"CIFAR-10": (128, 3, 32, 32), "SD": (16, 4, 64, 64)}
SIGMA, SIGMA_NEXT, GUIDANCE, SEED = 2.0, 1.5, 4.0, 7
# torch.compile adds a sample's terms in fewer lanes than eager, which is nearer the truth by up to this factor.
TOLERANCE = 8.0


def guided_step(x, denoised, uncond):
    guided = uncond + GUIDANCE * (denoised - uncond)
    following = x + (SIGMA_NEXT - SIGMA) * ((x - guided) / SIGMA)
    return following, (following - x).abs().flatten(1).mean(1)


def ours_guided_step(x, denoised, uncond):
    return ops.guided_step(x, denoised, SIGMA, SIGMA_NEXT, uncond=uncond, guidance=GUIDANCE)


def posterior(denoised, noisy, noise):
    ratio = (SIGMA_NEXT / SIGMA) ** 2
    return ratio * noisy + (1 - ratio) * denoised + SIGMA_NEXT * (1 - ratio) ** 0.5 * noise


def posterior_sample(denoised, noisy):
    return posterior(denoised, noisy, torch.randn_like(noisy))


def known_posterior_sample(denoised, noisy):
    """With the noise that ours draws."""
    return posterior(denoised, noisy, normals(noisy.shape, SEED, 0, "posterior", noisy.device).to(noisy.dtype))


def ours_posterior_sample(denoised, noisy):
    return ops.posterior_sample(denoised, noisy, SIGMA_NEXT, SIGMA, SEED)


def operands(count, shape):
    return lambda: [torch.randn(shape) for _ in range(count)]


WORKLOADS = [
    workload
    for network, shape in SHAPES.items()
    for workload in (
        Workload("guided_step", network, shape, operands(3, shape), guided_step, ours_guided_step, factor=TOLERANCE),
        Workload(
            "posterior_sample", network, shape, operands(2, shape), posterior_sample, ours_posterior_sample,
            factor=TOLERANCE, checkable=known_posterior_sample,
        ),
    )
]  # fmt: skip


def test_speed(case, measure):
    measure(case)
