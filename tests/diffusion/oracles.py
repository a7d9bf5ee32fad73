"""Denoisers and trajectories known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


def column(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


class GaussianNetwork(nn.Module):
    """The raw network F of the exact score of data N(0, c^2 I), for EDM preconditioning with sigma_data."""

    def __init__(self, c: float, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.c, self.sigma_data = c, sigma_data

    def forward(self, x: Tensor, noise_level: Tensor, **conditioning: object) -> Tensor:
        sigma = column((4 * noise_level).exp(), x)
        return x * sigma * (self.c**2 - self.sigma_data**2) / ((self.c**2 + sigma**2) * self.sigma_data)


def gaussian_denoiser(c: float) -> Callable[..., Tensor]:
    """E[x0 | x] for data N(0, c^2 I)."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = column(sigma, x)
        return x * (c**2 / (c**2 + sigma**2))

    return denoiser


def gaussian_flow(x: Tensor, c: float, sigma: float, sigma_next: float) -> Tensor:
    """The probability flow of data N(0, c^2 I) from sigma to sigma_next."""
    return x * math.sqrt((c**2 + sigma_next**2) / (c**2 + sigma**2))


def two_points(x: Tensor, sigma: Tensor, place: Tensor | None = None) -> Tensor:
    """E[x0 | x] for data at +place and -place in every coordinate; place [B], 1 where it is not given."""
    place = x.new_ones(()) if place is None else column(place, x)
    return place * torch.tanh(place * x / column(sigma, x) ** 2)


@dataclass
class Recorder:
    """A denoiser that keeps what it was called with."""

    denoiser: Callable[..., Tensor]
    calls: list[tuple[Tensor, Tensor, dict[str, object]]] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor, **conditioning: object) -> Tensor:
        self.calls.append((x, sigma, conditioning))
        return self.denoiser(x, sigma, **conditioning)


def given_noise(noise: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The denoiser whose noise prediction (x - D) / sigma is `noise(sigma)`, the same for every x."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = column(sigma, x)
        return x - sigma * noise(sigma)

    return denoiser


def geodesic(length: Callable[[float], float], num_steps: int, sigma_min: float, sigma_max: float) -> list[float]:
    """num_steps + 1 levels from sigma_max to sigma_min whose `length` is affine in the index, by bisection in ln sigma."""
    low, high = length(sigma_min), length(sigma_max)

    def level(target: float) -> float:
        a, b = math.log(sigma_min), math.log(sigma_max)
        for _ in range(80):
            middle = (a + b) / 2
            a, b = (middle, b) if length(math.exp(middle)) < target else (a, middle)
        return math.exp(a)

    return [sigma_max, *(level(high + (low - high) * i / num_steps) for i in range(1, num_steps)), sigma_min]


def gaussian_length(c: float) -> Callable[[float], float]:
    """Lambda(sigma) for one dimension of data N(0, c^2): 2 (asinh(sigma / c) - sigma / sqrt(c^2 + sigma^2))."""
    return lambda sigma: 2 * (math.asinh(sigma / c) - sigma / math.hypot(c, sigma))
