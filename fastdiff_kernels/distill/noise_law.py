"""The laws noise levels are drawn from in training, as values that a recipe can be given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_number
from ..diffusion import lognormal_sigmas, uniform_karras_sigmas

NoiseLaw = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(mean, std^2): the training law of EDM (Karras et al. 2022, Table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        check_number(self.mean, "mean")
        check_number(self.std, "std", above=0)

    def __call__(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` noise levels, float32 [count], on the generator's device."""
        return lognormal_sigmas(count, mean=self.mean, std=self.std, device=generator.device, generator=generator)


EDM_LAW = LogNormal()


@dataclass(frozen=True)
class KarrasUniform:
    """sigma = (sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, u ~ U(0, u_max).

    The generator's law of SiD and its descendants (Zhou et al. 2024): with the defaults sigma lies in [0.002, 24.41].
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    u_max: float = 0.8

    def __post_init__(self) -> None:
        check_number(self.sigma_min, "sigma_min", above=0)
        check_number(self.sigma_max, "sigma_max", above=self.sigma_min)
        check_number(self.rho, "rho", above=0)
        check_number(self.u_max, "u_max", above=0, maximum=1)

    def __call__(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` noise levels, float32 [count], on the generator's device."""
        laws = {"u_max": self.u_max, "sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "rho": self.rho}
        return uniform_karras_sigmas(count, **laws, device=generator.device, generator=generator)


def draw_levels(law: NoiseLaw, name: str, count: int, generator: torch.Generator) -> Tensor:
    """`count` noise levels [count] of the law that argument `name` gave."""
    sigma = law(count, generator)
    if not isinstance(sigma, Tensor) or not sigma.is_floating_point() or sigma.shape != (count,):
        got = f"{sigma.dtype} {list(sigma.shape)}" if isinstance(sigma, Tensor) else type(sigma).__name__
        raise ValueError(f"{name} must return floating-point noise levels of shape [{count}], got {got}")
    # To look at those on a GPU would synchronise with it in every step.
    if sigma.device.type == "cpu" and not bool(((sigma > 0) & sigma.isfinite()).all()):
        raise ValueError(f"{name} must return positive and finite noise levels, got from {sigma.min():.4g} to {sigma.max():.4g}")
    return sigma
