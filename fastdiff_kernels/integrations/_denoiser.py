"""Networks in the conventions of other codebases as denoisers of unscaled x."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion._checks import batched_sigma, check_samples, per_sample
from ..diffusion.guidance import guide, map_tensors, stack_conditioning


class ModelDenoiser(nn.Module):
    """A denoiser D(x, sigma) of unscaled x made of a model in another convention.

    Attributes:
        model: the network; call(model, scaled x, time, **conditioning) is its output.
        sigma_data: standard deviation of the data. guidance: of classifier-free guidance, 1 for none.
    """

    def __init__(
        self,
        model: nn.Module,
        parametrisation: Parametrisation,
        sigma_data: float,
        guidance: float,
        unconditional: Mapping[str, object] | None,
        call: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.parametrisation = parametrisation
        self.sigma_data = sigma_data
        self.guidance = float(guidance)
        self.unconditional = None if unconditional is None else dict(unconditional)

    def forward(self, x: Tensor, sigma: float | Tensor, **conditioning: Any) -> Tensor:
        """E[x0 | x] for x [B, ...] unscaled and sigma > 0, a number, 0-d or [B]; in the wider of x's dtype and the model's."""
        sigma = batched_sigma(sigma, check_samples(x, "x"))
        output = self._output(x, sigma, conditioning)
        of_x, of_output = self.parametrisation.denoised(sigma, self.sigma_data)
        return (per_sample(of_x, x) * x + per_sample(of_output, x) * output).to(output.dtype)

    def raw(self, x: Tensor, sigma: float | Tensor, **conditioning: Any) -> Tensor:
        """F = (D - c_skip x) / c_out of EDM's preconditioning, formed so that nothing cancels at small sigma; arguments as in `forward`."""
        sigma = batched_sigma(sigma, check_samples(x, "x"))
        output = self._output(x, sigma, conditioning)
        of_x, of_output = self.parametrisation.raw(sigma, self.sigma_data)
        return (per_sample(of_x, x) * x + per_sample(of_output, x) * output).to(output.dtype)

    def _output(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        if self.guidance == 1 or self.unconditional is None:
            return self._call(x, sigma, conditioning)
        batch = x.shape[0]
        absent = map_tensors(lambda value: value.to(x.device).expand(batch, *value.shape[1:]), self.unconditional)
        both = self._call(torch.cat((x, x)), torch.cat((sigma, sigma)), stack_conditioning(conditioning, absent))
        # The output enters D linearly, with coefficients of sigma alone.
        return guide(both[:batch], both[batch:], self.guidance)

    def _call(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        scaled = (per_sample(self.parametrisation.scale(sigma, self.sigma_data), x) * x).to(_dtype(self.model))
        output = self.call(self.model, scaled, self.parametrisation.time(sigma), **conditioning)
        if output.dim() == x.dim() and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ValueError(f"model must return a tensor of x's shape {list(x.shape)}, got {list(output.shape)}")
        return output.to(torch.promote_types(output.dtype, x.dtype))

    def extra_repr(self) -> str:
        return f"{type(self.parametrisation).__name__}, sigma_data={self.sigma_data}, guidance={self.guidance}"


Coefficients = tuple[Tensor, Tensor]


class Parametrisation(ABC):
    """What a model is given for (x, sigma), and what its output o means: D = a x + b o, and EDM's F = (D - c_skip x) / c_out likewise.

    sigma is [B]; s stands for it, d for sigma_data, and v for s^2 + d^2.
    """

    @abstractmethod
    def scale(self, s: Tensor, d: float) -> Tensor:
        """What x is multiplied by."""

    @abstractmethod
    def time(self, s: Tensor) -> Tensor:
        """The model's timestep, [B]."""

    @abstractmethod
    def denoised(self, s: Tensor, d: float) -> Coefficients:
        """(a, b)."""

    @abstractmethod
    def raw(self, s: Tensor, d: float) -> Coefficients:
        """((a - c_skip) / c_out, b / c_out), the difference taken on paper."""


class Discrete(Parametrisation):
    """Variance preserving, with timesteps from a table."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        # A schedule with zero terminal SNR ends at an infinite sigma.
        abar = alphas_cumprod.detach().to(device="cpu", dtype=torch.float64).clamp(min=2.0**-24)
        self.log_sigmas = ((1 - abar) / abar).log() / 2  # [T], rising

    def scale(self, s: Tensor, d: float) -> Tensor:
        return (1 + s**2).rsqrt()

    def time(self, s: Tensor) -> Tensor:
        if self.log_sigmas.device != s.device:
            self.log_sigmas = self.log_sigmas.to(s.device)
        table, log = self.log_sigmas, s.double().log()
        low = (torch.searchsorted(table, log) - 1).clamp(0, len(table) - 2)
        fraction = ((log - table[low]) / (table[low + 1] - table[low])).clamp(0, 1)
        return (low + fraction).to(s.dtype)


class Noise(Discrete):
    def denoised(self, s: Tensor, d: float) -> Coefficients:
        return torch.ones_like(s), -s

    def raw(self, s: Tensor, d: float) -> Coefficients:
        v = s**2 + d**2
        return s * v.rsqrt() / d, -v.sqrt() / d


class Velocity(Discrete):
    def denoised(self, s: Tensor, d: float) -> Coefficients:
        return 1 / (1 + s**2), -s * (1 + s**2).rsqrt()

    def raw(self, s: Tensor, d: float) -> Coefficients:
        v = s**2 + d**2
        return s * (1 - d**2) / ((1 + s**2) * v.sqrt() * d), -(v / (1 + s**2)).sqrt() / d


class Sample(Discrete):
    def denoised(self, s: Tensor, d: float) -> Coefficients:
        return torch.zeros_like(s), torch.ones_like(s)

    def raw(self, s: Tensor, d: float) -> Coefficients:
        v = s**2 + d**2
        return -d * v.rsqrt() / s, v.sqrt() / (s * d)


class Flow(Parametrisation):
    """x_t = (1 - t) x0 + t eps, and the model predicts eps - x0."""

    def __init__(self, time_scale: float) -> None:
        self.time_scale = time_scale

    def scale(self, s: Tensor, d: float) -> Tensor:
        return 1 / (1 + s)

    def time(self, s: Tensor) -> Tensor:
        return self.time_scale * (s / (1 + s))

    def denoised(self, s: Tensor, d: float) -> Coefficients:
        return 1 / (1 + s), -s / (1 + s)

    def raw(self, s: Tensor, d: float) -> Coefficients:
        v = s**2 + d**2
        return (s - d**2) / ((1 + s) * v.sqrt() * d), -v.sqrt() / ((1 + s) * d)


class Edm(Parametrisation):
    """EDM's preconditioning; the sign is that of c_out."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def scale(self, s: Tensor, d: float) -> Tensor:
        return (s**2 + d**2).rsqrt()

    def time(self, s: Tensor) -> Tensor:
        return s.log() / 4

    def denoised(self, s: Tensor, d: float) -> Coefficients:
        v = s**2 + d**2
        return d**2 / v, self.sign * s * d * v.rsqrt()

    def raw(self, s: Tensor, d: float) -> Coefficients:
        return torch.zeros_like(s), torch.full_like(s, self.sign)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
