"""Denoisers to and from k-diffusion, whose convention is this package's: model(x, sigma, **extra_args) -> E[x0 | x] for unscaled x.

No host is imported. A denoiser of this package goes into `sample_*` as it is, beside `Schedule.to_k_diffusion()` for its levels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_positive
from ..diffusion._checks import batched_sigma, check_samples, per_sample

__all__ = ["WrappedDenoiser", "as_denoiser"]


def as_denoiser(wrapper: nn.Module, *, sigma_data: float | None = None) -> WrappedDenoiser:
    """k-diffusion's denoiser wrapper (`Denoiser`, `VDenoiser`, `DiscreteEpsDDPMDenoiser`, ...) with the `.raw` and `.sigma_data` that
    `optimize_schedule` and the distillers ask for.

    Args:
        wrapper: called as wrapper(x, sigma [B], **conditioning) -> E[x0 | x].
        sigma_data: standard deviation of the data; None is the wrapper's own, or 1.

    Raises:
        TypeError, ValueError: wrapper is no module; sigma_data is not a positive number.
    """
    if not isinstance(wrapper, nn.Module):
        raise TypeError(f"wrapper must be a torch.nn.Module, got {type(wrapper).__name__}")
    if sigma_data is None:
        own: Any = getattr(wrapper, "sigma_data", 1.0)
        sigma_data = float(own)
    return WrappedDenoiser(wrapper, check_positive(sigma_data, "sigma_data"))


class WrappedDenoiser(nn.Module):
    """What `as_denoiser` returns. Attributes: wrapper, sigma_data."""

    def __init__(self, wrapper: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.wrapper = wrapper
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: float | Tensor, **conditioning: Any) -> Tensor:
        """E[x0 | x] in the wider of x's and the wrapper's dtype, for x [B, ...] unscaled and sigma > 0, a number, 0-d or [B]."""
        denoised = self.wrapper(x, batched_sigma(sigma, check_samples(x, "x")), **conditioning)
        return denoised.to(torch.promote_types(denoised.dtype, x.dtype))

    def raw(self, x: Tensor, sigma: float | Tensor, **conditioning: Any) -> Tensor:
        """F = (D - c_skip x) / c_out; arguments as in `forward`.

        Wrappers show no raw output that is the same for all of them, so that F is formed from D, in float64: its rounding error is that
        of D divided by sigma, which a float32 network feels below sigma = 0.01 sigma_data.
        """
        sigma = batched_sigma(sigma, check_samples(x, "x"))
        denoised = self.wrapper(x, sigma, **conditioning).double()
        s = sigma.double()
        variance = s**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / variance, s * self.sigma_data * variance.rsqrt()
        raw = (denoised - per_sample(c_skip, x) * x.double()) / per_sample(c_out, x)
        return raw.to(torch.promote_types(x.dtype, torch.float32))

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}"
