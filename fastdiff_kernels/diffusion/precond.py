"""EDM preconditioning: a raw network F made into a denoiser D."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_positive
from ._checks import batched_sigma, check_samples, per_sample


class EDMPrecond(nn.Module):
    """Denoiser D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), the estimate of E[x0 | x = x0 + sigma eps].

    With V = sigma^2 + sigma_data^2::

        c_skip = sigma_data^2 / V      c_out = sigma sigma_data / sqrt(V)
        c_in   = 1 / sqrt(V)           c_noise = ln(sigma) / 4

    (Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", Table 1.)

    Args:
        network: called as `network(c_in x, c_noise, **conditioning)`; x [B, ...] in its own dtype, c_noise float32 [B] (float64 when x is).
        sigma_data: standard deviation of the data, > 0.

    The coefficients are float32 and the result has the wider of x's and the network's dtype, so that a network with 16-bit inner
    layers (autocast, or a float32 head on 16-bit x) loses nothing here.
    """

    def __init__(self, network: nn.Module, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not callable(network):
            raise TypeError(f"network must be callable, got {type(network).__name__}")
        self.network = network
        self.sigma_data = check_positive(sigma_data, "sigma_data")

    def forward(self, x: Tensor, sigma: float | Tensor, **conditioning: object) -> Tensor:
        """D(x, sigma).

        Args:
            x: noisy samples [B, ...], unscaled.
            sigma: noise level > 0; a number, a 0-d tensor or a tensor [B].
            conditioning: handed to the network as it is, for example `class_labels` int64 [B].

        Raises:
            TypeError: x or sigma is not floating-point. ValueError: sigma has another shape or device, or is not positive and finite.
        """
        sigma = batched_sigma(sigma, check_samples(x, "x"))
        raw = self._raw(x, sigma, conditioning)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data * variance.rsqrt()
        return (per_sample(c_skip, x) * x + per_sample(c_out, x) * raw).to(raw.dtype)

    def raw(self, x: Tensor, sigma: float | Tensor, **conditioning: object) -> Tensor:
        """F(c_in x, c_noise) at the unscaled x [B, ...]; arguments and errors as in `forward`.

        Differences of scores and denoisers are formed from these, since c_skip x cancels in them exactly and not in D.
        """
        return self._raw(x, batched_sigma(sigma, check_samples(x, "x")), conditioning)

    def _raw(self, x: Tensor, sigma: Tensor, conditioning: dict[str, object]) -> Tensor:
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        raw = self.network((per_sample(c_in, x) * x).to(x.dtype), sigma.log() / 4, **conditioning)
        if raw.shape != x.shape:
            raise ValueError(f"network must return a tensor of x's shape {list(x.shape)}, got {list(raw.shape)}")
        return raw.to(torch.promote_types(raw.dtype, x.dtype))

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}"
