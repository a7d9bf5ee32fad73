"""Sample calls of the score matching ops, for the contract that every op is tested against."""

from __future__ import annotations

import torch


def _normals(count, dtype, device):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(3, 2, 5, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(count)]


def _constant(values, dtype, device):
    return torch.tensor(values, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)


def _constants(dtype, device):
    sigma, gamma, weight = [0.5, 1.0, 2.0], [1.0, 0.5, 1.5], [2.0, 1.0, 0.25]
    return [_constant(values, dtype, device) for values in (sigma, gamma, weight)]


def _lcss_noise(dtype, device):
    return [(*_normals(1, dtype, device), torch.tensor(11), 0), (*_normals(1, dtype, device), torch.tensor(-(2**40)), 2**33)]


def _lcss_perturb(dtype, device):
    return [
        (*_normals(1, dtype, device), _constant([0.5, 0.0, 2.0], dtype, device), torch.tensor(11), 0),
        (*_normals(1, dtype, device), _constant([0.5], dtype, device), torch.tensor(-1), 5),
    ]


def _lcss_loss(dtype, device):
    one = [_constant([value], dtype, device) for value in (0.5, 1.0, 2.0)]
    score, noise, mirrored = _normals(3, dtype, device)
    return [
        (score, noise, mirrored, *_constants(dtype, device)),
        (score, noise, None, *_constants(dtype, device)),
        (score, noise, None, *one),
    ]


def _lcss_loss_seeded(dtype, device):
    score, mirrored = _normals(2, dtype, device)
    return [
        (score, torch.tensor(11), mirrored, *_constants(dtype, device), 3),
        (score, torch.tensor(11), None, *_constants(dtype, device), 3),
    ]


def _denoising_loss(dtype, device):
    return [
        (*_normals(2, dtype, device), _constant([0.5, 1.0, 2.0], dtype, device)),
        (*_normals(2, dtype, device), _constant([1.5], dtype, device)),
    ]


SAMPLES = {
    "lcss_noise": _lcss_noise,
    "lcss_perturb": _lcss_perturb,
    "lcss_loss": _lcss_loss,
    "lcss_loss_seeded": _lcss_loss_seeded,
    "denoising_loss": _denoising_loss,
}
