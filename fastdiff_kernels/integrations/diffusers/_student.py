"""The scheduler with which a host's own pipeline samples a distilled model."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ...diffusion import Schedule
from ...distill import MomentMatchingDistiller, SIMDistiller
from .._denoiser import Discrete, Flow, Parametrisation
from ._denoiser import scheduler_parametrisation
from .scheduler import StudentScheduler

# From here on sigma / sqrt(1 + sigma^2) is 1 within 0.1 %.
_UNIT_NOISE = 22.4

Student = SIMDistiller | MomentMatchingDistiller | Schedule


def student_scheduler(scheduler: Any, student: Student, *, host_only: bool = False) -> Any:
    """The scheduler to save beside a distilled model in a pipeline's folder: the student's levels, timesteps and transitions.

    A `StudentScheduler` makes the pipeline's loop the student's `sample`, for noise, velocity, sample, flow and EDM predictions and any
    number of steps. Its class is this package's: `import fastdiff_kernels.integrations.diffusers` before `from_pretrained`. The pipeline
    is called with num_inference_steps = the student's and without guidance (guidance_scale=1), that of a guided teacher being distilled.

    The schedulers of diffusers space their timesteps evenly, or their levels by a formula, and so visit other levels than a student of
    several steps. `host_only` gives one of them all the same, whose folder loads without this package, for a model with alphas_cumprod. Its
    table holds the student's levels exactly, each at the integer timestep next to the one that the student was trained with; of a noise
    prediction sigma times what that changes is in D:

    * One step: `EulerDiscreteScheduler`. The pipeline has to scale noise by `init_noise_sigma` and inputs by `scale_model_input`, as Stable
      Diffusion's and ConsistencyModelPipeline do and DiT's does not.
    * Several: `DDPMScheduler`, whose transitions are the student's. The pipeline has to be told where, and take it:
      `pipeline(..., timesteps=pipeline.scheduler.config.student_timesteps)`.

    Args:
        scheduler: the teacher's, that `as_denoiser` was given.
        student: the recipe that distilled an `as_denoiser(model, scheduler)`; or the levels alone, as a `Schedule` that ends with 0.
        host_only: return a scheduler of diffusers, or raise.

    Raises:
        TypeError: an argument of the wrong kind; a scheduler that `as_denoiser` refuses; a student that is not of `as_denoiser`.
        ValueError: a schedule that does not end with 0; a scheduler with another table than the student's; with
            host_only, what no scheduler of diffusers does.
    """
    sigmas, parametrisation = _levels(student), scheduler_parametrisation(scheduler)
    own = parametrisation if isinstance(student, Schedule) else _own(student, parametrisation, sigmas)
    if host_only:
        return _of_host(scheduler, parametrisation, sigmas)
    # Only EDM's parametrisation has a sigma_data.
    scheduled = getattr(scheduler.config, "sigma_data", None) or 1.0
    sigma_data: Any = scheduled if isinstance(student, Schedule) else student.generator.sigma_data
    skip, out = own.denoised(sigmas, sigma_data)
    return StudentScheduler(
        sigmas=sigmas.tolist(),
        timesteps=parametrisation.time(sigmas).tolist(),
        input_scale=own.scale(sigmas, sigma_data).tolist(),
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


def _own(student: SIMDistiller | MomentMatchingDistiller, parametrisation: Parametrisation, sigmas: Tensor) -> Parametrisation:
    """The parametrisation that was distilled, if it is the scheduler's; the times of flows are the pipelines', not those of the model."""
    own = getattr(student.generator, "parametrisation", None)
    if type(own) is not type(parametrisation):
        raise TypeError(
            f"student must have been distilled from as_denoiser(model, scheduler) with this {type(parametrisation).__name__} scheduler, "
            f"got one of {type(student.generator if own is None else own).__name__}"
        )
    if not isinstance(own, Flow) and not torch.equal(own.time(sigmas), parametrisation.time(sigmas)):
        raise ValueError("scheduler must be the one the student was distilled with, got one with other timesteps at the student's levels")
    return own


def _of_host(scheduler: Any, parametrisation: Parametrisation, sigmas: Tensor) -> Any:
    """A scheduler with the teacher's table, but for the entries next to the levels, which hold these exactly."""
    if not isinstance(parametrisation, Discrete):
        raise ValueError(
            f"no scheduler of diffusers starts a model of {type(scheduler).__name__} at a level of one's own: those of flows start at "
            "t = 1, those of EDM scale noise by sqrt(sigma^2 + 1); use host_only=False"
        )
    table = parametrisation.log_sigmas.exp()
    if not (table[1] <= sigmas[-1] and sigmas[0] <= table[-1]):
        raise ValueError(
            f"the student's levels must lie within the scheduler's table, {table[1]:.4g} to {table[-1]:.4g}, got {sigmas.tolist()}"
        )
    places = (table.log() - sigmas.log()[:, None]).abs().argmin(1)  # [num_steps]
    if len(places.unique()) < len(places):
        raise ValueError(f"two of the student's levels {sigmas.tolist()} lie at one integer timestep; use host_only=False")
    table[places] = sigmas
    prediction = scheduler.config.prediction_type
    if len(sigmas) == 1:
        # A trailing step begins at the table's last entry.
        table = table[: int(places) + 1]
        return diffusers.EulerDiscreteScheduler(
            num_train_timesteps=len(table), trained_betas=_betas(table), prediction_type=prediction, timestep_spacing="trailing"
        )
    if sigmas[0] < _UNIT_NOISE:
        raise ValueError(f"DDPMScheduler begins with unit noise, which the level {float(sigmas[0]):.4g} is not; use host_only=False")
    made = diffusers.DDPMScheduler(
        num_train_timesteps=len(table), trained_betas=_betas(table), prediction_type=prediction, clip_sample=False
    )
    made.register_to_config(student_timesteps=places.tolist())
    return made


def _betas(sigmas: Tensor) -> list[float]:
    kept = 1 / (1 + sigmas**2)
    return (1 - kept / torch.cat((torch.ones(1, dtype=torch.float64), kept[:-1]))).tolist()
