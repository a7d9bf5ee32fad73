"""Sample calls of the distillation losses, for the contract that every op is tested against."""

from __future__ import annotations

import torch


def _normals(count, dtype, device):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, 2, 5, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(count)]


def _three(dtype, device):
    return _normals(3, dtype, device)


def _constant(values, dtype, device):
    return torch.tensor(values, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)


def _sim_loss(dtype, device):
    weight, c = _constant([0.5, 1.0, 2.0], dtype, device), _constant([0.3], dtype, device)
    none = _constant([0.0], dtype, device)
    c_skip, c_out = _constant([0.9, 0.5, 0.1], dtype, device), _constant([0.4], dtype, device)
    return [
        (*_normals(4, dtype, device), c_skip, c_out, weight, c, "pseudo_huber"),
        (*_three(dtype, device), None, None, None, weight, c, "pseudo_huber"),
        (*_three(dtype, device), None, None, None, _constant([1.5], dtype, device), none, "pseudo_huber"),
        (*_three(dtype, device), None, None, None, weight, none, "l2"),
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
