"""The scheduler with which a host's own pipeline samples a distilled model."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ...diffusion import Schedule
from ...distill import MomentMatchingDistiller, SIMDistiller
from .._denoiser import Discrete, Flow, ModelDenoiser, Parametrisation
from ._denoiser import scheduler_parametrisation
from .scheduler import StudentScheduler

Student = SIMDistiller | MomentMatchingDistiller | Schedule


def student_scheduler(scheduler: Any, student: Student, *, host_only: bool = False) -> Any:
    """The scheduler to save beside a distilled model in a pipeline's folder: the student's levels, timesteps and transitions.

    A `StudentScheduler` makes the pipeline's loop the student's `sample`, for noise, velocity, sample, flow and EDM predictions and any
    number of steps. Its class is this package's: `import fastdiff_kernels.integrations.diffusers` before `from_pretrained`. The pipeline
    is called with num_inference_steps = the student's, with the guidance that was distilled (1 unless the teacher was guided).

    The schedulers of diffusers space their timesteps evenly, or their levels by a formula, and so visit other levels than a student of
    several steps. One step of a model with alphas_cumprod they can do: `host_only` gives an `EulerDiscreteScheduler` for it, whose folder
    loads without this package. Its only timestep is the integer next to the one that the student was trained with, and the pipeline has to
    scale noise by `init_noise_sigma` and inputs by `scale_model_input`, as Stable Diffusion's and ConsistencyModelPipeline do and DiT's
    does not.

    Args:
        scheduler: the teacher's, that `as_denoiser` was given.
        student: the recipe that distilled an `as_denoiser(model, scheduler)`; or the levels alone, as a `Schedule` that ends with 0.
        host_only: return a scheduler of diffusers, or raise.

    Raises:
        TypeError: an argument of the wrong kind; a scheduler that `as_denoiser` refuses; a student that is not of `as_denoiser`.
        ValueError: a schedule that does not end with 0; with host_only, what no scheduler of diffusers does.
    """
    sigmas = _levels(student)
    denoiser = None if isinstance(student, Schedule) else student.generator
    parametrisation = scheduler_parametrisation(scheduler)
    if denoiser is not None and not (isinstance(denoiser, ModelDenoiser) and type(denoiser.parametrisation) is type(parametrisation)):
        raise TypeError(f"student must have been distilled from as_denoiser(model, scheduler), got one of {type(denoiser).__name__}")
    if host_only:
        return _euler(scheduler, parametrisation, sigmas)
    # EDM's scale is the network's and flows and discrete schedules have none.
    sigma_data = getattr(scheduler.config, "sigma_data", None) or 1.0 if denoiser is None else denoiser.sigma_data
    skip, out = parametrisation.denoised(sigmas, sigma_data)
    return StudentScheduler(
        sigmas=sigmas.tolist(),
        timesteps=parametrisation.time(sigmas).tolist(),
        input_scale=parametrisation.scale(sigmas, sigma_data).tolist(),
        skip=skip.tolist(),
        out=out.tolist(),
        num_train_timesteps=scheduler.config.num_train_timesteps,
        use_flow_sigmas=isinstance(parametrisation, Flow),
    )


def _levels(student: Student) -> Tensor:
    """The levels at which the student is called, float64 [num_steps]."""
    if isinstance(student, SIMDistiller):
        return torch.tensor([student.sigma_init], dtype=torch.float64)
    if isinstance(student, MomentMatchingDistiller):
        return student.sigma(torch.arange(student.num_steps, 0, -1) / student.num_steps).double()
    if not isinstance(student, Schedule):
        raise TypeError(f"student must be a SIMDistiller, a MomentMatchingDistiller or a Schedule, got {type(student).__name__}")
    if student.sigmas[-1] != 0:
        raise ValueError(f"student must end with the level 0, where its last step leads, got {student.sigmas[-1]:.4g}")
    return student.sigmas[:-1]


def _euler(scheduler: Any, parametrisation: Parametrisation, sigmas: Tensor) -> Any:
    """The teacher's table up to the level, which its last entry holds exactly; one trailing step starts there."""
    if not isinstance(parametrisation, Discrete):
        raise ValueError(
            f"no scheduler of diffusers starts a model of {type(scheduler).__name__} at a level of one's own: those of flows start at "
            "t = 1, those of EDM scale noise by sqrt(sigma^2 + 1); use host_only=False"
        )
    if len(sigmas) > 1:
        raise ValueError(f"no scheduler of diffusers is configured to the {len(sigmas)} levels of the student; use host_only=False")
    sigma, table = float(sigmas[0]), parametrisation.log_sigmas.exp()
    if not table[1] <= sigma <= table[-1]:
        raise ValueError(f"the student's level must lie within the scheduler's table, {table[1]:.4g} to {table[-1]:.4g}, got {sigma:.4g}")
    last = int((table.log() - sigmas.log()).abs().argmin())
    kept = 1 / (1 + torch.cat((table[:last], sigmas)) ** 2)
    betas = 1 - kept / torch.cat((torch.ones(1, dtype=torch.float64), kept[:-1]))
    return diffusers.EulerDiscreteScheduler(
        num_train_timesteps=last + 1,
        trained_betas=betas.tolist(),
        prediction_type=scheduler.config.prediction_type,
        timestep_spacing="trailing",
    )
