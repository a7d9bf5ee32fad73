"""A diffusers model with its scheduler's convention, as a denoiser of unscaled x."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..._checks import check_number, check_positive
from ...diffusion.guidance import check_conditioning
from .._denoiser import Edm, Flow, ModelDenoiser, Noise, Parametrisation, Sample, Velocity

# These multiply their timestep by 1000 themselves.
_UNIT_TIME = ("FluxTransformer2DModel",)


def as_denoiser(
    model: nn.Module,
    scheduler: Any,
    *,
    sigma_data: float | None = None,
    guidance: float = 1.0,
    unconditional: Mapping[str, object] | None = None,
    time_scale: float | None = None,
    shared: Mapping[str, Any] | None = None,
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
        unconditional: the keys of the conditioning given in calls, tensors [1, ...], or dicts of them as SDXL's added_cond_kwargs.
        time_scale: what a flow model multiplies t in (0, 1] by: num_train_timesteps, but 1 for Flux.
        shared: arguments of every call that have no row for each sample, as Flux's img_ids and txt_ids, handed on as they are.

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
    parametrisation = scheduler_parametrisation(scheduler, time_scale)
    if isinstance(parametrisation, Flow) and time_scale is None and type(getattr(model, "_orig_mod", model)).__name__ in _UNIT_TIME:
        parametrisation = Flow(1.0)
    if sigma_data is None:
        sigma_data = getattr(scheduler.config, "sigma_data", None) or 1.0
    absent = None if unconditional is None else check_conditioning(unconditional, 1, "unconditional")
    call = partial(_call, **(shared or {}))
    return ModelDenoiser(model, parametrisation, check_positive(sigma_data, "sigma_data"), guidance, absent, call)


def _call(model: nn.Module, x: Tensor, time: Tensor, **conditioning: Any) -> Tensor:
    return model(x, timestep=time, **conditioning, return_dict=False)[0]


_DISCRETE: dict[str, Callable[[Tensor], Parametrisation]] = {"epsilon": Noise, "v_prediction": Velocity, "sample": Sample}


def scheduler_parametrisation(scheduler: Any, time_scale: float | None = None) -> Parametrisation:
    """What a model trained for the scheduler is given and returns; a flow's times are multiplied by its num_train_timesteps unless told."""
    config = getattr(scheduler, "config", None)
    if config is None:
        raise TypeError(f"scheduler must be a diffusers scheduler, got {type(scheduler).__name__}")
    name, prediction = type(scheduler).__name__, getattr(config, "prediction_type", None)
    if name.startswith("FlowMatch") or prediction == "flow_prediction":
        return Flow(check_positive(float(config.num_train_timesteps) if time_scale is None else time_scale, "time_scale"))
    if time_scale is not None:
        raise ValueError(f"time_scale is for flow models, and {name} with prediction_type={prediction!r} is none")
    if name.startswith("EDM"):
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"scheduler ({name}) must have prediction_type 'epsilon' or 'v_prediction', got {prediction!r}")
        return Edm(1 if prediction == "epsilon" else -1)
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise TypeError(f"scheduler must have alphas_cumprod, or be FlowMatch... or EDM..., got {name}")
    if prediction not in _DISCRETE:
        raise ValueError(f"scheduler ({name}) must have prediction_type {', '.join(map(repr, _DISCRETE))}, got {prediction!r}")
    return _DISCRETE[prediction](scheduler.alphas_cumprod)
