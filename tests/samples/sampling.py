"""Sample calls of the sampling steps, for the contract that every op is tested against."""

from __future__ import annotations

import torch


def _normals(count, dtype, device):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(3, 2, 5, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(count)]


def _constant(values, dtype, device):
    return torch.tensor(values, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)


def _posterior_sample(dtype, device):
    seed = torch.tensor(11)
    return [
        (*_normals(2, dtype, device), _constant([0.0, 0.5, 0.75], dtype, device), _constant([1.0, 2.0, 0.75], dtype, device), seed, 0),
        (*_normals(2, dtype, device), _constant([0.25], dtype, device), _constant([1.0], dtype, device), seed, 7),
    ]


def _guided_step(dtype, device):
    x, denoised, uncond = _normals(3, dtype, device)
    sigma, sigma_next = _constant([1.0, 2.0, 0.5], dtype, device), _constant([0.5, 0.25, 0.0], dtype, device)
    return [
        (x, denoised, sigma, sigma_next, uncond, _constant([1.5], dtype, device)),
        (x, denoised, sigma, sigma_next, uncond, _constant([1.0, 3.0, 0.0], dtype, device)),
        (x, denoised, _constant([2.0], dtype, device), _constant([1.5], dtype, device), None, _constant([1.0], dtype, device)),
    ]


SAMPLES = {"posterior_sample": _posterior_sample, "guided_step": _guided_step}
