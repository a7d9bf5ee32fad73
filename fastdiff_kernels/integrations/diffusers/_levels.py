"""At which noise level a model is called, as the loop's scheduler has it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def check_levels(scheduler: Any, wanted: str) -> None:
    """Raises where `level` has no answer, or where the model's output is no noise prediction, for the option `wanted`."""
    name = type(scheduler).__name__
    prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor) or prediction != "epsilon":
        raise ValueError(f"{wanted} needs a scheduler with alphas_cumprod and prediction_type 'epsilon', got {name} with {prediction!r}")
    if getattr(scheduler, "order", 1) > 1:
        raise ValueError(f"{wanted} needs a scheduler that evaluates once a step, got {name}, which evaluates some levels twice")


def level(scheduler: Any, time: float) -> float:
    """sigma of x0 + sigma eps at a timestep of the loop: the scheduler's own of that step, or its table's where it lists none."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        abar = float(scheduler.alphas_cumprod[round(time)].clamp(min=2.0**-24))  # infinite at a terminal SNR of zero
        return math.sqrt((1 - abar) / abar)
    places = (scheduler.timesteps == time).nonzero()
    if len(places) == 0:
        raise ValueError(f"timestep must be one of the scheduler's, {scheduler.timesteps.tolist()}, got {time}")
    return float(sigmas[int(places[0])])


def on_line(scheduler: Any, sigma: float) -> float:
    """Where a prediction at sigma stands on the axis along which the scheduler's solver takes it for a line: -ln sigma or sigma."""
    return -math.log(sigma) if hasattr(scheduler, "lambda_t") else sigma
