"""How the demo draws samples: each function turns (noise, set index) into (samples, network calls)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..diffusion import AdaptiveSkip, FixedSkip, Schedule, sample
from ..distill.recipe import same_level

Sampler = Callable[[Tensor, int], tuple[Tensor, int]]


def solve(
    denoiser: nn.Module,
    labels: Tensor,
    schedule: Schedule,
    solver: str,
    skip: AdaptiveSkip | FixedSkip | None = None,
    skipped: list[list[bool]] | None = None,
) -> Sampler:
    """The probability-flow solver of `diffusion.sample`; which steps each run skipped is appended to `skipped`."""

    def sampler(noise: Tensor, index: int) -> tuple[Tensor, int]:
        result = sample(denoiser, noise, schedule, solver=solver, conditioning={"class_labels": labels}, skip=skip)
        if skipped is not None:
            skipped.append(result.skipped.tolist())
        return result.samples, result.nfe

    return sampler


def one_call(generator: nn.Module, labels: Tensor, sigma_init: float) -> Sampler:
    """x = g(sigma_init noise, sigma_init)."""

    @torch.no_grad()
    def sampler(noise: Tensor, index: int) -> tuple[Tensor, int]:
        return generator(sigma_init * noise, same_level(sigma_init, noise), class_labels=labels), 1

    return sampler


def ancestral(generator: nn.Module, labels: Tensor, sigmas: list[float], seed: int) -> Sampler:
    """Algorithm 1 of moment matching (Salimans et al. 2024): denoise, then draw the next level from q(z_s | z_t, x~)."""

    @torch.no_grad()
    def sampler(noise: Tensor, index: int) -> tuple[Tensor, int]:
        noisy = sigmas[0] * noise
        for step, sigma in enumerate(sigmas):
            denoised = generator(noisy, same_level(sigma, noisy), class_labels=labels)
            if step + 1 < len(sigmas):
                noisy = ops.posterior_sample(denoised, noisy, sigmas[step + 1], sigma, 1_000_000 * seed + 1_000 * index + step)
        return denoised, len(sigmas)

    return sampler


@dataclass(frozen=True)
class EvenSkip(FixedSkip):
    """Compute exactly `calls` of `steps` steps, spread evenly: the fixed stride at any number of calls."""

    every: int = 1
    calls: int = 1
    steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.calls <= self.steps:
            raise ValueError(f"calls must be from 1 to steps={self.steps}, got {self.calls}")

    def computes(self, step: int) -> bool:
        return any(step == i * self.steps // self.calls for i in range(self.calls))


def psnr(samples: Tensor, reference: Tensor, scale: float) -> float:
    """-10 log10 of the mean squared error in pixel units of [0, 1]; `scale` is a pixel unit of the data in model units."""
    error = float(((samples - reference).double() * scale).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)
