"""A diffusers model with its scheduler's convention, as a denoiser of unscaled x."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..._checks import check_number, check_positive
from ...diffusion._checks import batched_sigma, check_samples, per_sample
from ...diffusion.guidance import guide, stack_conditioning

# These multiply their timestep by 1000 themselves.
_UNIT_TIME = ("FluxTransformer2DModel",)


def as_denoiser(
    model: nn.Module,
    scheduler: Any,
    *,
    sigma_data: float | None = None,
    guidance: float = 1.0,
    unconditional: Mapping[str, Tensor] | None = None,
    time_scale: float | None = None,
) -> ModelDenoiser:
    """The model as `denoiser(x, sigma, **conditioning) -> E[x0 | x]`, for `optimize_schedule`, the samplers and the distillers.

    x = x0 + sigma eps is unscaled. With o the model's output and c what the scheduler says about it::

        noise prediction    o(x / sqrt(1 + sigma^2), t)     D = x - sigma o
        v_prediction        o(x / sqrt(1 + sigma^2), t)     D = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) o
        sample              o(x / sqrt(1 + sigma^2), t)     D = o
        flow                o(x / (1 + sigma), t)           D = (x - sigma o) / (1 + sigma),  t = sigma / (1 + sigma)
        EDM                 o(x / sqrt(sigma^2 + sigma_data^2), ln(sigma) / 4),  Karras et al. 2022, Table 1

    For the first three t is where ln sqrt(1 / alphas_cumprod - 1) equals ln sigma, between integer timesteps linearly; a sigma outside of
    the table uses its first or last timestep.

    Args:
        model: a diffusers model, patched or not, called as model(x, timestep=..., **conditioning, return_dict=False)[0]. Where it returns
            twice x's channels the first half is used, and the other is its variance. x is cast to the model's dtype, D keeps x's.
        scheduler: what it was trained for: one with alphas_cumprod (DDPM, DDIM, Euler, DPM-Solver, ...), FlowMatch..., or EDM...
        sigma_data: standard deviation of the data; the scheduler's own where it has one, else 1, which variance-preserving
            diffusion and latent models are made for.
        guidance: of classifier-free guidance, in one call on a doubled batch. Not 1 only with `unconditional`.
        unconditional: the keys of the conditioning given in calls, each [1, ...].
        time_scale: what a flow model multiplies t in (0, 1] by: num_train_timesteps, but 1 for Flux.

    Returns:
        ModelDenoiser, a module that holds the model. It offers `.raw` and `.sigma_data`, as `EDMPrecond` does.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; a scheduler or prediction type that is none of the above; guidance without
            `unconditional`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if check_number(guidance, "guidance") != 1 and unconditional is None:
        raise ValueError(f"guidance needs unconditional, which is None; got guidance = {guidance}")
    parametrisation = _parametrisation(model, scheduler, time_scale)
    if sigma_data is None:
        sigma_data = getattr(scheduler.config, "sigma_data", None) or 1.0
    return ModelDenoiser(model, parametrisation, check_positive(sigma_data, "sigma_data"), guidance, unconditional)


class ModelDenoiser(nn.Module):
    """What `as_denoiser` returns.

    Attributes:
        model: the diffusers model. sigma_data: standard deviation of the data. guidance: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        parametrisation: Parametrisation,
        sigma_data: float,
        guidance: float,
        unconditional: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__()
        self.model = model
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
        absent: dict[str, object] = {key: value.to(x.device).expand(batch, *value.shape[1:]) for key, value in self.unconditional.items()}
        both = self._call(torch.cat((x, x)), torch.cat((sigma, sigma)), stack_conditioning(conditioning, absent))
        # The output enters D linearly, with coefficients of sigma alone.
        return guide(both[:batch], both[batch:], self.guidance)

    def _call(self, x: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        scaled = (per_sample(self.parametrisation.scale(sigma, self.sigma_data), x) * x).to(_dtype(self.model))
        output = self.model(scaled, timestep=self.parametrisation.time(sigma), **conditioning, return_dict=False)[0]
        if output.dim() == x.dim() and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise ValueError(f"model must return a tensor of x's shape {list(x.shape)}, got {list(output.shape)}")
        return output.to(torch.promote_types(output.dtype, x.dtype))

    def extra_repr(self) -> str:
        return f"{type(self.parametrisation).__name__}, sigma_data={self.sigma_data}, guidance={self.guidance}"


Coefficients = tuple[Tensor, Tensor]


class Parametrisation:
    """What a model is given for (x, sigma), and what its output o means: D = a x + b o, and EDM's F = (D - c_skip x) / c_out likewise.

    sigma is [B]; s stands for it, d for sigma_data, and v for s^2 + d^2.
    """

    def scale(self, s: Tensor, d: float) -> Tensor:
        """What x is multiplied by."""
        raise NotImplementedError

    def time(self, s: Tensor) -> Tensor:
        """The model's timestep, [B]."""
        raise NotImplementedError

    def denoised(self, s: Tensor, d: float) -> Coefficients:
        """(a, b)."""
        raise NotImplementedError

    def raw(self, s: Tensor, d: float) -> Coefficients:
        """((a - c_skip) / c_out, b / c_out), the difference taken on paper."""
        raise NotImplementedError


class _Discrete(Parametrisation):
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


class _Noise(_Discrete):
    def denoised(self, s: Tensor, d: float) -> Coefficients:
        return torch.ones_like(s), -s

    def raw(self, s: Tensor, d: float) -> Coefficients:
        v = s**2 + d**2
        return s * v.rsqrt() / d, -v.sqrt() / d


class _Velocity(_Discrete):
    def denoised(self, s: Tensor, d: float) -> Coefficients:
        return 1 / (1 + s**2), -s * (1 + s**2).rsqrt()

    def raw(self, s: Tensor, d: float) -> Coefficients:
        v = s**2 + d**2
        return s * (1 - d**2) / ((1 + s**2) * v.sqrt() * d), -(v / (1 + s**2)).sqrt() / d


class _Sample(_Discrete):
    def denoised(self, s: Tensor, d: float) -> Coefficients:
        return torch.zeros_like(s), torch.ones_like(s)

    def raw(self, s: Tensor, d: float) -> Coefficients:
        v = s**2 + d**2
        return -d * v.rsqrt() / s, v.sqrt() / (s * d)


class _Flow(Parametrisation):
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


class _Edm(Parametrisation):
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


_DISCRETE: dict[str, Callable[[Tensor], Parametrisation]] = {"epsilon": _Noise, "v_prediction": _Velocity, "sample": _Sample}


def _parametrisation(model: nn.Module, scheduler: Any, time_scale: float | None) -> Parametrisation:
    config = getattr(scheduler, "config", None)
    if config is None:
        raise TypeError(f"scheduler must be a diffusers scheduler, got {type(scheduler).__name__}")
    name, prediction = type(scheduler).__name__, getattr(config, "prediction_type", None)
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        if time_scale is None:
            time_scale = 1.0 if type(model).__name__ in _UNIT_TIME else float(config.num_train_timesteps)
        return _Flow(check_positive(time_scale, "time_scale"))
    if time_scale is not None:
        raise ValueError(f"time_scale is for flow models, and {name} with prediction_type={prediction!r} is none")
    if name.startswith("EDM"):
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"scheduler ({name}) must have prediction_type 'epsilon' or 'v_prediction', got {prediction!r}")
        return _Edm(1 if prediction == "epsilon" else -1)
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise TypeError(f"scheduler must have alphas_cumprod, or be FlowMatch... or EDM..., got {name}")
    if prediction not in _DISCRETE:
        raise ValueError(f"scheduler ({name}) must have prediction_type {', '.join(map(repr, _DISCRETE))}, got {prediction!r}")
    return _DISCRETE[prediction](scheduler.alphas_cumprod)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
