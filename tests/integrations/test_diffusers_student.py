"""A distilled model saved as a folder, loaded and sampled by the host's own pipeline as by its own sampler."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fastdiff_kernels import ops
from fastdiff_kernels.diffusion import Schedule
from fastdiff_kernels.distill import MomentMatchingDistiller, SIMDistiller
from fastdiff_kernels.distill.recipe import mixed_seed
from fastdiff_kernels.integrations.diffusers import StudentScheduler, as_denoiser, patch, student_scheduler
from fastdiff_kernels.integrations.diffusers import scheduler as scheduler_module
from tests.integrations.models import dit_pipeline, randn, text_pipeline, unet_2d, wan

# The schedulers' own, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TEACHERS = {
    "epsilon": diffusers.DDPMScheduler(),
    "v_prediction": diffusers.DDPMScheduler(prediction_type="v_prediction"),
    "sample": diffusers.DDPMScheduler(prediction_type="sample"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": diffusers.EDMEulerScheduler(),
    "edm_v": diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
}


def tiny_unet() -> nn.Module:
    torch.manual_seed(0)
    return unet_2d(block_out_channels=(8, 8), attention_head_dim=4).eval()


def loaded(pipeline: diffusers.DiffusionPipeline, folder) -> Any:
    pipeline.save_pretrained(folder)
    pipeline = type(pipeline).from_pretrained(folder, **{name: None for name, part in pipeline.components.items() if part is None})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def calls_of(model: nn.Module, run) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """What run() returns, and for each call of the model its input and timesteps."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        x = given["sample"] if "sample" in given else given["hidden_states"]
        calls.append((x.clone(), torch.as_tensor(given["timestep"], dtype=torch.float32).flatten()[0]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            return run(), calls
    finally:
        handle.remove()


def share_noise(monkeypatch, levels: list[float], shape: tuple[int, ...], seed: int, module: Any = scheduler_module) -> Tensor:
    """Gives the scheduler of a module the noise that `sample(seed=...)` draws; returns the first of it, which pipelines are handed."""
    zero, drawn = torch.zeros(shape), []
    for step, (t, s) in enumerate(pairwise(levels)):
        drawn.append(ops.posterior_sample(zero, zero, s, t, mixed_seed(seed, step)) / (s * (1 - (s / t) ** 2) ** 0.5))
    drawn.append(zero)  # for a scheduler that adds none of it in the last step
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: drawn.pop(0))
    return torch.randn(shape, generator=torch.Generator().manual_seed(mixed_seed(seed)))


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_pipeline_samples_a_student_as_the_student_samples_itself(kind: str, num_steps: int, tmp_path, monkeypatch) -> None:
    denoiser = as_denoiser(tiny_unet(), TEACHERS[kind], sigma_data=0.5)
    student = MomentMatchingDistiller(denoiser, num_steps=num_steps, sample_shape=(3, 8, 8))
    for _ in range(2):
        student.step(0.5 * randn(2, 3, 8, 8))
    model = student.generator.model
    pipeline = loaded(diffusers.ConsistencyModelPipeline(model, student_scheduler(TEACHERS[kind], student)), tmp_path)
    assert type(pipeline.scheduler) is StudentScheduler
    own, expected = calls_of(model, lambda: student.sample(2, seed=3))
    levels = student.sigma(torch.arange(num_steps, 0, -1) / num_steps).tolist()
    noise = share_noise(monkeypatch, levels, (2, 3, 8, 8), 3)
    images, actual = calls_of(pipeline.unet, lambda: pipeline(2, num_inference_steps=num_steps, latents=noise, output_type="pt").images)
    assert len(actual) == len(expected) == num_steps
    for (x, time), (own_x, own_time) in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, own_x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(time, own_time, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(images, (own / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


def test_the_levels_are_the_students_and_not_those_of_even_timesteps() -> None:
    ddpm = TEACHERS["epsilon"]
    student = MomentMatchingDistiller(as_denoiser(tiny_unet(), ddpm, sigma_data=0.5), num_steps=2)
    scheduler = student_scheduler(ddpm, student)
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == pytest.approx([80.0, 0.497, 0.0], rel=1e-3)
    times = as_denoiser(tiny_unet(), ddpm).parametrisation.time(student.sigma(torch.tensor([1.0, 0.5])))
    torch.testing.assert_close(scheduler.timesteps, times)


def one_step(model: nn.Module, teacher: Any, shape: tuple[int, ...], sigma: float = 2.5) -> SIMDistiller:
    """A generator that has taken one step, and so is no longer its teacher."""
    return SIMDistiller(as_denoiser(model, teacher, sigma_data=0.5), sample_shape=shape, sigma_init=sigma)


def test_a_one_step_generator_of_a_patched_model_is_the_pipelines_one_step(tmp_path) -> None:
    teacher = tiny_unet()
    patch(teacher)
    ddpm = TEACHERS["epsilon"]
    sim = one_step(teacher, ddpm, (3, 8, 8))
    sim.step(2)
    pipeline = loaded(diffusers.ConsistencyModelPipeline(sim.generator.model, student_scheduler(ddpm, sim)), tmp_path)
    noise = randn(2, 3, 8, 8)
    images = pipeline(2, num_inference_steps=1, latents=noise, output_type="pt").images
    with torch.no_grad():
        generated = sim.generator(2.5 * noise, 2.5)
    torch.testing.assert_close(images, (generated / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)


def test_dits_pipeline_takes_a_students_steps(tmp_path, monkeypatch) -> None:
    """It neither scales its noise nor takes any, so that the student has to begin where the noise is all there is."""
    later = randn(1, 4, 8, 8, seed=7)
    monkeypatch.setattr(scheduler_module, "randn_tensor", lambda *args, **kwargs: later)
    ddim = diffusers.DDIMScheduler()
    pipeline = dit_pipeline(ddim)
    denoiser = as_denoiser(pipeline.transformer, ddim)
    levels = Schedule([150.0, 0.8, 0.0])
    pipeline.scheduler = student_scheduler(ddim, levels)
    pipeline = loaded(pipeline, tmp_path)
    images, calls = calls_of(
        pipeline.transformer,
        lambda: (
            pipeline([3], guidance_scale=1.0, generator=torch.Generator().manual_seed(5), num_inference_steps=2, output_type="np").images
        ),
    )
    with torch.no_grad():
        x = 150 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        d = denoiser(x, 150.0, class_labels=torch.tensor([3]))
        kept = (0.8 / 150) ** 2
        x = kept * x + (1 - kept) * d + 0.8 * (1 - kept) ** 0.5 * later
        d = denoiser(x, 0.8, class_labels=torch.tensor([3]))
        decoded = pipeline.vae.decode(d / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(calls[1][0], x / (1 + 0.8**2) ** 0.5, rtol=1e-3, atol=1e-3)
    expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(images), expected, rtol=1e-3, atol=1e-3)


def test_stable_diffusions_pipeline_takes_a_guided_students_step(tmp_path) -> None:
    pytest.importorskip("transformers")
    teacher, prompt, nothing = (
        diffusers.DDIMScheduler(prediction_type="v_prediction", steps_offset=1),
        randn(1, 7, 12),
        randn(1, 7, 12, seed=2),
    )
    pipeline = text_pipeline("sd", student_scheduler(teacher, Schedule([2.5, 0.0])))
    pipeline = loaded(pipeline, tmp_path)
    noise = randn(1, 4, 8, 8)
    latents = pipeline(
        prompt_embeds=prompt, negative_prompt_embeds=nothing, guidance_scale=3.0, num_inference_steps=1, latents=noise, output_type="latent"
    ).images
    guided = as_denoiser(pipeline.unet, teacher, guidance=3.0, unconditional={"encoder_hidden_states": nothing})
    with torch.no_grad():
        expected = guided(2.5 * noise, 2.5, encoder_hidden_states=prompt)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sigmas", [[4.0, 0.0], [80.0, 1.5, 0.4, 0.0]], ids=["one", "three"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow_pipelines_take_a_students_steps(name: str, sigmas: list[float], tmp_path, monkeypatch) -> None:
    """They do not scale their noise, but take latents."""
    pytest.importorskip("transformers")
    teacher = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = student_scheduler(teacher, Schedule(sigmas))
    text: dict[str, Tensor] = {"encoder_hidden_states": randn(1, 5, 20, seed=2), "pooled_projections": randn(1, 10, seed=3)}
    given = {"prompt_embeds": text["encoder_hidden_states"], "pooled_prompt_embeds": text["pooled_projections"], "height": 8, "width": 8}
    noise = randn(1, 4, 8, 8)
    if name == "sd3":
        given["guidance_scale"] = 1.0
    else:
        noise = randn(1, 16, 16)
        rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
        text |= {"img_ids": torch.stack((torch.zeros(16), rows.flatten(), columns.flatten()), 1), "txt_ids": torch.zeros(5, 3)}
    pipeline = loaded(text_pipeline(name, scheduler), tmp_path)
    later = [randn(*noise.shape, seed=seed) for seed in (7, 8)]
    drawn = iter(later)
    monkeypatch.setattr(scheduler_module, "randn_tensor", lambda *args, **kwargs: next(drawn))
    latents = pipeline.scheduler.init_noise_sigma * noise
    result = pipeline(**given, latents=latents, num_inference_steps=len(sigmas) - 1, output_type="latent").images
    denoiser = as_denoiser(pipeline.transformer, teacher)
    with torch.no_grad():
        x = sigmas[0] * noise
        for t, s, z in zip(sigmas, sigmas[1:], [*later, noise], strict=False):
            denoised = denoiser(x, t, **text)
            x = (s / t) ** 2 * x + (1 - (s / t) ** 2) * denoised + s * (1 - (s / t) ** 2) ** 0.5 * z
    torch.testing.assert_close(result, denoised, rtol=1e-3, atol=1e-3)


def test_wans_pipeline_takes_a_students_step() -> None:
    pytest.importorskip("transformers")
    teacher = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    torch.manual_seed(0)
    decoder = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    scheduler, model = student_scheduler(teacher, Schedule([4.0, 0.0])), wan().eval()
    pipeline = diffusers.WanPipeline(None, None, decoder, scheduler, model)
    pipeline.set_progress_bar_config(disable=True)
    noise, text = randn(1, 4, 2, 4, 4), randn(1, 5, 16, seed=2)
    given = {"prompt_embeds": text, "negative_prompt_embeds": text, "guidance_scale": 1.0, "height": 32, "width": 32, "num_frames": 5}
    latents = scheduler.init_noise_sigma * noise
    result = pipeline(**given, latents=latents, num_inference_steps=1, output_type="latent").frames
    with torch.no_grad():
        expected = as_denoiser(model, teacher)(4.0 * noise, 4.0, encoder_hidden_states=text)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_one_step_can_do_with_a_scheduler_of_the_host(kind: str, tmp_path) -> None:
    sim = one_step(tiny_unet(), TEACHERS[kind], (3, 8, 8))
    scheduler = student_scheduler(TEACHERS[kind], sim, host_only=True)
    pipeline = loaded(diffusers.ConsistencyModelPipeline(sim.generator.model, scheduler), tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]
    noise = randn(2, 3, 8, 8)
    images = pipeline(2, num_inference_steps=1, latents=noise, output_type="pt").images
    with torch.no_grad():
        generated = sim.generator(2.5 * noise, 2.5)
    # The pipeline's timestep is the integer next to the one that belongs to 2.5.
    torch.testing.assert_close(images, (generated / 2 + 0.5).clamp(0, 1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_several_steps_can_do_with_a_scheduler_of_the_host_that_is_told_the_timesteps(kind: str, tmp_path, monkeypatch) -> None:
    denoiser = as_denoiser(tiny_unet(), TEACHERS[kind], sigma_data=0.5)
    student = MomentMatchingDistiller(denoiser, num_steps=4, sample_shape=(3, 8, 8))
    scheduler = student_scheduler(TEACHERS[kind], student, host_only=True)
    pipeline = loaded(diffusers.ConsistencyModelPipeline(student.generator.model, scheduler), tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDPMScheduler"]
    # All but the fractions of timesteps is the student's own.
    exact = student.generator.parametrisation.time
    monkeypatch.setattr(student.generator.parametrisation, "time", lambda sigma: exact(sigma).round())
    own, expected = calls_of(student.generator.model, lambda: student.sample(2, seed=3))
    levels = student.sigma(torch.arange(4, 0, -1) / 4).tolist()
    noise = share_noise(monkeypatch, levels, (2, 3, 8, 8), 3, diffusers.schedulers.scheduling_ddpm)
    steps = pipeline.scheduler.config.student_timesteps
    given = {"num_inference_steps": None, "timesteps": steps, "latents": noise, "output_type": "pt"}
    images, actual = calls_of(pipeline.unet, lambda: pipeline(2, **given).images)
    abar = pipeline.scheduler.alphas_cumprod[steps]
    torch.testing.assert_close(((1 - abar) / abar).sqrt(), torch.tensor(levels), rtol=1e-4, atol=0)
    for (x, time), (own_x, own_time) in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, own_x, rtol=5e-3, atol=5e-3)
        assert time == own_time
    torch.testing.assert_close(images, (own / 2 + 0.5).clamp(0, 1), rtol=5e-3, atol=5e-3)


def test_transitions_are_the_posterior_given_the_denoised_sample() -> None:
    """q(x_s | x_t, x0) has mean x0 + (s / t)^2 (x_t - x0) and variance s^2 (t^2 - s^2) / t^2."""
    t, s = 3.0, 1.0
    scheduler = student_scheduler(TEACHERS["sample"], Schedule([t, s, 0.0]))
    y, x0 = torch.full((20000,), 5.0) / 10**0.5, torch.full((20000,), -1.0)
    out = scheduler.step(x0, scheduler.timesteps[0], y, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(out.pred_original_sample, x0)
    moved = out.prev_sample.double() * 2**0.5
    variance = s**2 * (t**2 - s**2) / t**2
    assert float(moved.mean()) == pytest.approx(-1 + (s / t) ** 2 * 6, abs=4 * (variance / 20000) ** 0.5)
    assert float(moved.var()) == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((diffusers.VQDiffusionScheduler(4), Schedule([2.0, 0.0])), {}, TypeError, "must have alphas_cumprod, or be FlowMatch"),
        ((TEACHERS["epsilon"], 2.5), {}, TypeError, "student must be a SIMDistiller, a MomentMatchingDistiller or a Schedule, got float"),
        ((TEACHERS["epsilon"], Schedule([2.0, 1.0])), {}, ValueError, "student must end with the level 0"),
        ((TEACHERS["flow"], Schedule([2.0, 0.0])), {"host_only": True}, ValueError, "those of flows start at t = 1"),
        ((TEACHERS["edm"], Schedule([2.0, 0.0])), {"host_only": True}, ValueError, r"those of EDM scale noise by sqrt\(sigma\^2 \+ 1\)"),
        (
            (TEACHERS["epsilon"], Schedule([2.0, 1.0, 0.0])),
            {"host_only": True},
            ValueError,
            "begins with unit noise, which the level 2 is not",
        ),
        ((TEACHERS["epsilon"], Schedule([50.0, 1.001, 1.0, 0.0])), {"host_only": True}, ValueError, "lie at one integer timestep"),
        ((TEACHERS["epsilon"], Schedule([1000.0, 0.0])), {"host_only": True}, ValueError, "levels must lie within the scheduler's table"),
    ],
)
def test_what_cannot_be_represented_is_refused(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        student_scheduler(*arguments, **options)


def test_a_student_of_another_scheduler_is_refused() -> None:
    sim = one_step(tiny_unet(), TEACHERS["flow"], (3, 8, 8))
    with pytest.raises(TypeError, match="with this Noise scheduler, got one of Flow"):
        student_scheduler(TEACHERS["epsilon"], sim)
    sim = one_step(tiny_unet(), TEACHERS["epsilon"], (3, 8, 8))
    with pytest.raises(ValueError, match="scheduler must be the one the student was distilled with"):
        student_scheduler(diffusers.DDPMScheduler(beta_schedule="scaled_linear"), sim)


def test_other_counts_and_steps_beyond_the_last_are_refused() -> None:
    scheduler = student_scheduler(TEACHERS["epsilon"], Schedule([2.0, 0.0]))
    with pytest.raises(ValueError, match="num_inference_steps must be 1, the student's, got 50"):
        scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="begin_index must be 0"):
        scheduler.set_begin_index(1)
    scheduler.step(randn(1, 2), scheduler.timesteps[0], randn(1, 2))
    with pytest.raises(RuntimeError, match="all 1 steps of the student were taken"):
        scheduler.step(randn(1, 2), scheduler.timesteps[0], randn(1, 2))
    with pytest.raises(ValueError, match="equally long and not empty"):
        StudentScheduler(sigmas=[2.0, 1.0])
