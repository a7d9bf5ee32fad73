"""Sample calls of the distillation losses, for the contract that every op is tested against."""

from __future__ import annotations

import torch


def _three(dtype, device):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 2, 5, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3)]


def _constant(values, dtype, device):
    return torch.tensor(values, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)


def _sim_loss(dtype, device):
    weight, c = _constant([0.5, 1.0, 2.0], dtype, device), _constant([0.3], dtype, device)
    none = _constant([0.0], dtype, device)
    return [
        (*_three(dtype, device), weight, c, "pseudo_huber"),
        (*_three(dtype, device), _constant([1.5], dtype, device), none, "pseudo_huber"),
        (*_three(dtype, device), weight, none, "l2"),
    ]


def _moment_matching(dtype, device):
    return [
        (*_three(dtype, device), _constant([0.5, 1.0, 2.0], dtype, device)),
        (*_three(dtype, device), _constant([1.5], dtype, device)),
    ]


SAMPLES = {
    "sim_loss": _sim_loss,
    "moment_matching_loss": _moment_matching,
    "moment_matching_auxiliary_loss": _moment_matching,
}
