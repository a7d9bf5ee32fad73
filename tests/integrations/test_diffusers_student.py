"""A distilled model saved as a folder, loaded and sampled by the host's own pipeline."""

from __future__ import annotations

import diffusers
import pytest
import torch

from fastdiff_kernels.distill import MomentMatchingDistiller, SIMDistiller
from fastdiff_kernels.integrations.diffusers import as_denoiser, patch, student_scheduler
from tests.integrations.models import randn, unet_2d

# The schedulers' own, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def loaded(model: torch.nn.Module, scheduler, folder) -> diffusers.ConsistencyModelPipeline:
    diffusers.ConsistencyModelPipeline(unet=model, scheduler=scheduler).save_pretrained(folder)
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_one_step_generator_is_the_pipelines_one_step(tmp_path) -> None:
    teacher = unet_2d(block_out_channels=(8, 8), attention_head_dim=4)
    patch(teacher)
    ddpm = diffusers.DDPMScheduler()
    sim = SIMDistiller(as_denoiser(teacher, ddpm, sigma_data=0.5), sample_shape=(3, 8, 8), sigma_init=2.5)
    sim.step(2)
    pipeline = loaded(sim.generator.model, student_scheduler(ddpm, 2.5), tmp_path)
    assert type(pipeline.scheduler) is diffusers.EulerDiscreteScheduler
    noise = randn(2, 3, 8, 8)
    images = pipeline(2, num_inference_steps=1, latents=noise, output_type="pt").images
    with torch.no_grad():
        generated = sim.generator(2.5 * noise, 2.5)
    # The pipeline's timestep is the integer next to the one that belongs to 2.5.
    torch.testing.assert_close(images, (generated / 2 + 0.5).clamp(0, 1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("num_steps", [2, 4])
def test_a_few_step_student_takes_that_many_steps_from_its_first_level(num_steps: int, tmp_path) -> None:
    ddpm = diffusers.DDPMScheduler()
    denoiser = as_denoiser(unet_2d(block_out_channels=(8, 8), attention_head_dim=4), ddpm, sigma_data=0.5)
    student = MomentMatchingDistiller(denoiser, num_steps=num_steps)
    pipeline = loaded(student.generator.model, student_scheduler(ddpm, 80.0, num_steps), tmp_path)
    calls = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: calls.append(float(args[1])))
    assert torch.isfinite(pipeline(2, num_inference_steps=num_steps, output_type="pt").images).all()
    assert len(calls) == num_steps
    assert pipeline.scheduler.sigmas[0].item() == pytest.approx(80.0, rel=1e-4)
    assert calls[0] == pytest.approx(float(denoiser.parametrisation.time(torch.tensor([80.0]))), abs=0.5)


def test_ancestral_steps_are_the_posterior_given_the_denoised_sample() -> None:
    """q(x_s | x_t, x0) has mean x0 + (s / t)^2 (x_t - x0) and variance s^2 (t^2 - s^2) / t^2."""
    scheduler = student_scheduler(diffusers.DDPMScheduler(), 80.0, 2)
    scheduler.set_timesteps(2)
    t, s = scheduler.sigmas[:2].double()
    x, x0 = torch.full((4000,), 50.0), torch.full((4000,), -1.0)
    moved = scheduler.step((x - x0) / t.float(), scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(0)).prev_sample.double()
    variance = s**2 * (t**2 - s**2) / t**2
    assert float(moved.mean()) == pytest.approx(float(-1 + (s / t) ** 2 * 51), abs=4 * float((variance / 4000).sqrt()))
    assert float(moved.var()) == pytest.approx(float(variance), rel=0.1)


@pytest.mark.parametrize(
    ("scheduler", "sigma", "steps", "error", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), 2.0, 1, TypeError, "FlowMatchEulerDiscreteScheduler has none"),
        (diffusers.DDPMScheduler(), 1000.0, 1, ValueError, "sigma_max must lie within the scheduler's table"),
        (diffusers.DDPMScheduler(prediction_type="sample"), 2.0, 1, ValueError, "which Euler's take, got 'sample'"),
        (diffusers.DDPMScheduler(), 0.03, 50, ValueError, "num_steps must be at most"),
    ],
)
def test_what_no_scheduler_can_do_is_refused(scheduler, sigma: float, steps: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        student_scheduler(scheduler, sigma, steps)
