"""Denoisers with closed forms, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class GaussianDenoiser(nn.Module):
    """E[x0 | x] for x0 ~ N(mean, std^2): (std^2 x + sigma^2 mean) / (std^2 + sigma^2)."""

    sigma_data = 0.5

    def __init__(self, mean: float | list[float] | Tensor, std: float | Tensor) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.as_tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.as_tensor(std, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        variance = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, *[1] * (x.dim() - 1)) ** 2
        return (self.std**2 * x + variance * self.mean) / (self.std**2 + variance)


class LinearScoreDenoiser(nn.Module):
    """The denoiser whose score is -k x at every noise level."""

    sigma_data = 0.5

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma.double().reshape(-1, *[1] * (x.dim() - 1)) ** 2 * self.k * x


class LinearDenoiser(nn.Module):
    """x -> k x at every noise level."""

    sigma_data = 0.5

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(k, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.k * x


@pytest.fixture
def gaussian_denoiser() -> type[GaussianDenoiser]:
    return GaussianDenoiser


@pytest.fixture
def linear_score_denoiser() -> type[LinearScoreDenoiser]:
    return LinearScoreDenoiser


@pytest.fixture
def linear_denoiser() -> type[LinearDenoiser]:
    return LinearDenoiser


@pytest.fixture
def tiny_denoiser():
    """A factory of small class-conditional image denoisers with dropout and non-zero output, equal for equal seeds."""
    from fastdiff_kernels.diffusion import EDMPrecond
    from fastdiff_kernels.nn import UNet

    def make(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> EDMPrecond:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            network = UNet(1, channels=8, multipliers=(1,), num_heads=1, num_groups=2, num_classes=3, condition_dim=8, dropout=dropout)
            for parameter in network.parameters():
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
        return EDMPrecond(network.to(dtype), 0.5)

    return make
