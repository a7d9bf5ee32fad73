"""Schedules in the schedulers of the installed diffusers: they hold the levels, and sample along them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor

from fastdiff_kernels.diffusion import Schedule, sample
from fastdiff_kernels.integrations.diffusers import as_denoiser
from tests.integrations.models import dit_pipeline, randn, text_pipeline

DATA = 0.7
LEVELS = Schedule([14.0, 6.0, 2.5, 1.1, 0.4, 0.1, 0.0])
TIMES = LEVELS.to_flow_matching()
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

SCHEDULERS: dict[str, tuple[Callable, Schedule]] = {
    "edm_euler": (lambda: diffusers.EDMEulerScheduler(), LEVELS),
    "edm_euler_other_range": (lambda: diffusers.EDMEulerScheduler(sigma_min=0.1, sigma_max=20.0, rho=3.0), LEVELS),
    "euler": (lambda: diffusers.EulerDiscreteScheduler(**SD), LEVELS),
    "flow_match": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), TIMES),
    "flow_match_shift": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), TIMES),
    "dpm": (lambda: diffusers.DPMSolverMultistepScheduler(**SD), LEVELS),
    "dpm_flow": (lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0), TIMES),
    "unipc": (lambda: diffusers.UniPCMultistepScheduler(**SD), LEVELS),
    "unipc_flow": (lambda: diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0), TIMES),
}
# The schedulers' own, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


@every_scheduler
def test_the_scheduler_holds_the_levels_again_whenever_a_pipeline_sets_it(name: str) -> None:
    build, schedule = SCHEDULERS[name]
    scheduler = build()
    arguments = schedule.to_diffusers(scheduler)
    for held in (scheduler, copy.deepcopy(scheduler)):
        held.set_timesteps(**arguments)
        torch.testing.assert_close(held.sigmas.double(), schedule.sigmas, rtol=1e-6, atol=0)
        assert len(held.timesteps) == schedule.num_steps
        assert bool((held.timesteps.diff() < 0).all())


def sampled(scheduler, x: Tensor, predict: Callable[[Tensor, float], Tensor]) -> Tensor:
    """The loop of every pipeline; predict(scaled sample, level) is the model."""
    for step, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(predict(scaled, float(scheduler.sigmas[step])), t, x).prev_sample
    return x


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    s = sigma.view(-1, 1, 1, 1)
    return x * DATA**2 / (DATA**2 + s**2)


@pytest.mark.parametrize("name", ["edm_euler", "euler", "flow_match_shift"])
def test_eulers_steps_along_the_levels_are_ours(name: str) -> None:
    build, schedule = SCHEDULERS[name]
    scheduler = build()
    schedule.to_diffusers(scheduler)
    noise = randn(2, 3, 4, 4)
    ours = sample(gaussian, noise, LEVELS, solver="euler").samples

    def predict(x: Tensor, level: float) -> Tensor:
        if name == "flow_match_shift":
            s = level / (1 - level)
            denoised = gaussian(x * (1 + s), torch.full((2,), s))
            return (x - denoised) / level
        if name == "euler":
            full = x * math.hypot(1, level)
            return (full - gaussian(full, torch.full((2,), level))) / level
        v = level**2 + 0.25
        full = x * math.sqrt(v)
        return (gaussian(full, torch.full((2,), level)) - 0.25 / v * full) * math.sqrt(v) / (0.5 * level)

    start = noise * float(schedule.sigmas[0])
    torch.testing.assert_close(sampled(scheduler, start, predict), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dpm", "dpm_flow", "unipc", "unipc_flow"])
def test_multistep_solvers_reach_the_data_along_the_levels(name: str) -> None:
    build, _ = SCHEDULERS[name]
    scheduler, schedule, flow = build(), Schedule.karras(24, 0.03, 14.0), name.endswith("flow")
    (schedule.to_flow_matching() if flow else schedule).to_diffusers(scheduler)
    noise = randn(2, 3, 4, 4)

    def predict(x: Tensor, level: float) -> Tensor:
        s = level / (1 - level) if flow else level
        full = x * (1 + s if flow else math.hypot(1, s))
        denoised = gaussian(full, torch.full((2,), s))
        predicted_noise = (full - denoised) / s
        return predicted_noise - denoised if flow else predicted_noise

    # The probability flow of Gaussian data is known.
    exact = noise * 14.0 * DATA / math.hypot(DATA, 14.0)
    start = noise * 14.0 / (15.0 if flow else math.hypot(1, 14.0))
    torch.testing.assert_close(sampled(scheduler, start, predict), exact, rtol=0.02, atol=0.01)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd", diffusers.EulerDiscreteScheduler(**SD, steps_offset=1)),
        ("sd", diffusers.EDMEulerScheduler()),
        ("sd3", diffusers.FlowMatchEulerDiscreteScheduler()),
        ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ],
    ids=["euler", "edm_euler", "flow_match", "flow_match_shift"],
)
def test_a_pipeline_handed_the_arguments_samples_as_sample_does(name: str, scheduler) -> None:
    pytest.importorskip("transformers")
    schedule = TIMES if name == "sd3" else LEVELS
    arguments = schedule.to_diffusers(copy.deepcopy(scheduler))
    pipeline = text_pipeline(name, scheduler)
    noise, text = randn(1, 4, 8, 8), {"encoder_hidden_states": randn(1, 5, 20 if name == "sd3" else 12, seed=2)}
    given = {"prompt_embeds": text["encoder_hidden_states"], "guidance_scale": 1.0}
    start = noise * float(schedule.sigmas[0])
    if name == "sd3":
        text["pooled_projections"] = given["pooled_prompt_embeds"] = randn(1, 10, seed=3)
        given |= {"height": 8, "width": 8}
    else:
        # This pipeline multiplies what it is given; EDM's by the largest level of its config.
        is_edm = isinstance(scheduler, diffusers.EDMEulerScheduler)
        start = start / (scheduler.init_noise_sigma if is_edm else float(schedule.sigmas[0]))
    latents = pipeline(**given, **arguments, latents=start, output_type="latent").images
    assert pipeline.scheduler.sigmas.tolist() == pytest.approx(schedule.sigmas.tolist(), rel=1e-5)
    model = pipeline.transformer if name == "sd3" else pipeline.unet
    ours = sample(as_denoiser(model, scheduler), noise, LEVELS, solver="euler", conditioning=text).samples
    torch.testing.assert_close(latents, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))


def test_a_pipeline_samples_along_the_levels() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD)
    pipeline = dit_pipeline(scheduler)
    Schedule([10.0, 1.0, 0.1, 0.0]).to_diffusers(pipeline.scheduler)
    seen = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True)
    images = pipeline([1], num_inference_steps=3, output_type="np").images
    assert seen == scheduler.timesteps.tolist()
    assert scheduler.sigmas.tolist() == pytest.approx([10.0, 1.0, 0.1, 0.0])
    assert images.shape[0] == 1


def test_another_count_of_steps_is_refused_and_deleting_gives_the_scheduler_back() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**SD)
    LEVELS.to_diffusers(scheduler)
    with pytest.raises(ValueError, match="num_inference_steps must be 6, as the schedule has, got 20"):
        scheduler.set_timesteps(20)
    Schedule([3.0, 1.0, 0.0]).to_diffusers(scheduler)
    assert len(scheduler.timesteps) == 2
    del scheduler.set_timesteps
    scheduler.set_timesteps(20)
    assert len(scheduler.timesteps) == 20


@pytest.mark.parametrize(
    ("scheduler", "schedule", "message"),
    [
        (diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"), LEVELS, "a step of higher order to the final 0"),
        (diffusers.DPMSolverMultistepScheduler(**FLOW), LEVELS, "its levels are times below 1 and the first here is 14"),
        (diffusers.UniPCMultistepScheduler(**FLOW), Schedule([1.0, 0.5, 0.0]), "its levels are times below 1 and the first here is 1"),
        (diffusers.EulerDiscreteScheduler(**SD), Schedule([80.0, 40.0, 1.0, 0.0]), "the levels 80 and 40 both lie at its timestep 999"),
        (diffusers.DPMSolverMultistepScheduler(**SD), Schedule([80.0, 40.0, 1.0, 0.0]), "the levels 80 and 40 both lie at its timestep"),
        (diffusers.EDMEulerScheduler(sigma_schedule="exponential"), LEVELS, "sigma_schedule='exponential' ignores the levels"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), TIMES, "use_dynamic_shifting=True replaces the levels"),
    ],
)
def test_what_a_scheduler_cannot_represent_is_refused(scheduler, schedule: Schedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule.to_diffusers(scheduler)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDMScheduler", "LCMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_schedulers_of_integer_times_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"scheduler must be one of EDMEulerScheduler, .* got {name}"):
        LEVELS.to_diffusers(getattr(diffusers, name)())
