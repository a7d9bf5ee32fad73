"""The scheduler with which a host's own pipeline samples a distilled model."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ..._checks import check_count, check_positive


def student_scheduler(scheduler: Any, sigma_max: float, num_steps: int = 1) -> Any:
    """A scheduler for a distilled `as_denoiser(model, scheduler)`, to be saved beside the model in a pipeline's folder.

    Its table of noise levels is the teacher's up to sigma_max, which the last entry holds exactly, so that a pipeline's
    `num_inference_steps=num_steps` starts there, at the timestep the student was trained with but for a fraction. One step is
    x0 = D(sigma_max z, sigma_max), what `SIMDistiller` trains; several are ancestral ones (`EulerAncestralDiscreteScheduler`), whose law
    q(x_s | x_t, x0 = D) is the one `MomentMatchingDistiller` samples from, at levels spaced evenly in timesteps.

    Args:
        scheduler: the teacher's, with alphas_cumprod and prediction_type epsilon or v_prediction.
        sigma_max: the level the student starts from: sigma_init of SIM, sigma_max of moment matching.
        num_steps: how many steps the pipeline will take.

    Returns:
        EulerDiscreteScheduler, or EulerAncestralDiscreteScheduler for several steps. The pipeline has to scale its noise by
        `scheduler.init_noise_sigma` and its inputs by `scheduler.scale_model_input`, as Stable Diffusion's and ConsistencyModelPipeline do.

    Raises:
        TypeError: scheduler has no alphas_cumprod. ValueError: sigma_max is outside of the
            table; another prediction_type; num_steps exceeds its timesteps.
    """
    check_positive(sigma_max, "sigma_max")
    check_count(num_steps, "num_steps")
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alphas, torch.Tensor):
        raise TypeError(f"scheduler must have alphas_cumprod, and {type(scheduler).__name__} has none")
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"scheduler must have prediction_type 'epsilon' or 'v_prediction', which Euler's take, got {prediction!r}")
    abar = alphas.detach().double().cpu()
    sigmas = ((1 - abar) / abar).sqrt()
    if not sigmas[1] <= sigma_max <= sigmas[-1]:
        raise ValueError(f"sigma_max must lie within the scheduler's table, {sigmas[1]:.4g} to {sigmas[-1]:.4g}, got {sigma_max}")
    last = int((sigmas.log() - torch.tensor(sigma_max).double().log()).abs().argmin())
    if num_steps > last + 1:
        raise ValueError(f"num_steps must be at most {last + 1}, the timesteps up to sigma_max, got {num_steps}")
    kept = torch.cat((abar[:last], 1 / (1 + torch.tensor([sigma_max]).double() ** 2)))
    betas = 1 - kept / torch.cat((torch.ones(1, dtype=torch.float64), kept[:-1]))
    kind = diffusers.EulerDiscreteScheduler if num_steps == 1 else diffusers.EulerAncestralDiscreteScheduler
    return kind(
        num_train_timesteps=last + 1,
        trained_betas=betas.tolist(),
        prediction_type=prediction,
        timestep_spacing="trailing",
    )
