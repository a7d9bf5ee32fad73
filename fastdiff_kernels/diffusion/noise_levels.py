"""Laws that noise levels are drawn from in training, and the weights that go with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_count, check_positive


def lognormal_sigmas(
    count: int,
    *,
    mean: float = -1.2,
    std: float = 1.2,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`count` levels with ln(sigma) ~ N(mean, std^2), float32 [count] (Karras et al. 2022, Table 1, "training")."""
    check_count(count, "count", 0)
    check_positive(std, "std")
    return (mean + std * torch.randn(count, device=device, generator=generator)).exp()


def loguniform_sigmas(
    count: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`count` levels with ln(sigma) uniform between the ends, float32 [count]."""
    check_count(count, "count", 0)
    check_range(sigma_min, sigma_max)
    u = torch.rand(count, device=device, generator=generator)
    return (math.log(sigma_min) + math.log(sigma_max / sigma_min) * u).exp()


def karras_sigmas(u: Tensor, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """sigma = (sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho: u = 0 gives sigma_min, u = 1 sigma_max.

    u is any floating-point tensor within [0, 1]; the result has its shape and dtype (Karras et al. 2022, eq. 5, read from the clean end).
    """
    check_range(sigma_min, sigma_max)
    check_positive(rho, "rho")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def uniform_karras_sigmas(
    count: int,
    *,
    u_max: float = 0.8,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`karras_sigmas(u)` for u ~ U(0, u_max), float32 [count]; the defaults give SiD's generator law, levels from 0.002 to 24.41."""
    check_count(count, "count", 0)
    if check_positive(u_max, "u_max") > 1:
        raise ValueError(f"u_max must be at most 1, got {u_max}")
    u = u_max * torch.rand(count, device=device, generator=generator)
    return karras_sigmas(u, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2: the weight under which a denoising loss has unit scale at every level."""
    check_positive(sigma_data, "sigma_data")
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def check_range(sigma_min: float, sigma_max: float) -> None:
    """0 < sigma_min < sigma_max, both finite."""
    check_positive(sigma_min, "sigma_min")
    check_positive(sigma_max, "sigma_max")
    if sigma_min >= sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")
