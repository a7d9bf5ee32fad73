"""Denoisers made of a model and a scheduler: exact where the data are Gaussian, equal to the scheduler's own, and good for the recipes."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fastdiff_kernels.diffusion import AdaptiveSkip, Schedule, optimize_schedule, sample
from fastdiff_kernels.diffusion.guidance import map_tensors
from fastdiff_kernels.distill import LearningRate, MomentMatchingDistiller, SIMDistiller, Trainer
from fastdiff_kernels.integrations.diffusers import ModelDenoiser, as_denoiser, patch
from tests.diffusion.oracles import gaussian_length, geodesic
from tests.integrations.models import BY_NAME, randn, unet_2d

DATA = 0.7  # standard deviation of the Gaussian data
KINDS = ("epsilon", "v_prediction", "sample", "flow", "edm", "edm_v")


def scheduler(kind: str):
    if kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler()
    if kind.startswith("edm"):
        return diffusers.EDMEulerScheduler(sigma_data=0.5, prediction_type="v_prediction" if kind == "edm_v" else "epsilon")
    return diffusers.DDPMScheduler(prediction_type=kind)


def unscaled(kind: str, x: Tensor, s: Any) -> Tensor:
    """x0 + s eps from what the network is given in each convention."""
    if kind == "flow":
        return x * (1 + s)
    return x * (s**2 + (0.25 if kind.startswith("edm") else 1.0)) ** 0.5


def spoken(kind: str, x: Tensor, s: Any, denoised: Tensor) -> Tensor:
    """The network output that means `denoised` at unscaled x in each convention."""
    noise, v = (x - denoised) / s, s**2 + 0.25
    raw = (denoised - 0.25 / v * x) * v**0.5 / (0.5 * s)
    return {
        "epsilon": noise,
        "v_prediction": (noise - s * denoised) / (1 + s**2) ** 0.5,
        "sample": denoised,
        "flow": noise - denoised,
        "edm": raw,
        "edm_v": -raw,
    }[kind]


class Exact(nn.Module):
    """What a perfect model of data N(0, DATA^2) returns in each convention, at the sigma its timestep stands for."""

    def __init__(self, kind: str, sigma: float) -> None:
        super().__init__()
        self.kind, self.sigma = kind, sigma
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        self.times.append(timestep)
        x = unscaled(self.kind, x, self.sigma)
        return (spoken(self.kind, x, self.sigma, x * DATA**2 / (DATA**2 + self.sigma**2)) + self.weight,)


class Gaussian(nn.Module):
    """A model that knows data N(mean, std^2), learns both, and tells the noise level from its timestep."""

    def __init__(self, kind: str, mean: float, std: float) -> None:
        super().__init__()
        self.kind = kind
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.std = nn.Parameter(torch.tensor(std, dtype=torch.float64))
        abar = diffusers.DDPMScheduler().alphas_cumprod.double()
        self.log_sigmas = ((1 - abar) / abar).log() / 2

    def level(self, timestep: Tensor) -> Tensor:
        if self.kind == "flow":
            return timestep / (1000 - timestep)
        if self.kind.startswith("edm"):
            return (4 * timestep).exp()
        low = timestep.long().clamp(max=998)
        return torch.lerp(self.log_sigmas[low], self.log_sigmas[low + 1], timestep - low).exp()

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        s = self.level(timestep.double()).view(-1, *[1] * (x.dim() - 1))
        x = unscaled(self.kind, x, s)
        return (spoken(self.kind, x, s, (self.std**2 * x + s**2 * self.mean) / (self.std**2 + s**2)),)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.02, 0.7, 12.0])
def test_gaussian_data_give_the_exact_denoiser_and_raw_output(kind: str, sigma: float) -> None:
    x = randn(3, 2, 4, 4).double() * math.hypot(sigma, DATA)
    model = Exact(kind, sigma)
    denoiser = as_denoiser(model, scheduler(kind), sigma_data=0.5)
    exact = x * DATA**2 / (DATA**2 + sigma**2)
    torch.testing.assert_close(denoiser(x, sigma), exact, rtol=1e-12, atol=1e-12)
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / math.hypot(sigma, 0.5)
    torch.testing.assert_close(denoiser.raw(x, sigma), (exact - c_skip * x) / c_out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_it_agrees_with_ddpms_own_prediction_at_every_timestep(kind: str) -> None:
    ddpm = diffusers.DDPMScheduler(prediction_type=kind, clip_sample=False)
    model = BY_NAME["UNet2DModel"].model()
    denoiser = as_denoiser(model, ddpm)
    for time in (1, 400, 998):
        abar = ddpm.alphas_cumprod[time].double()
        sigma = ((1 - abar) / abar).sqrt()
        scaled = randn(2, 3, 8, 8)
        output = model(scaled, time, return_dict=False)[0]
        expected = ddpm.step(output, time, scaled).pred_original_sample
        actual = denoiser(scaled * float((1 + sigma**2).sqrt()), float(sigma))
        # x goes to float32 unscaled and back.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(sigma))


def test_flow_times_are_those_of_the_pipelines() -> None:
    for sigma in (0.25, 4.0):
        model = Exact("flow", sigma)
        as_denoiser(model, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))(torch.ones(2, 1), sigma)
        torch.testing.assert_close(model.times[0], torch.full((2,), 1000 * sigma / (1 + sigma)))
    flux = BY_NAME["FluxTransformer2DModel"]
    denoiser = as_denoiser(flux.model(), diffusers.FlowMatchEulerDiscreteScheduler())
    assert denoiser.parametrisation.time(torch.ones(1)).item() == 0.5
    inputs = {key: v for key, v in flux.inputs().items() if key not in ("hidden_states", "timestep")}
    assert denoiser(randn(2, 12, 4), 1.0, **inputs).shape == (2, 12, 4)


def test_arguments_without_rows_are_shared_by_all_samples() -> None:
    """Flux's positions; its guidance is one more condition of each sample."""
    case, flow = BY_NAME["FluxTransformer2DModel"], diffusers.FlowMatchEulerDiscreteScheduler()
    model, inputs = case.model(), case.inputs()
    shared = {key: inputs[key] for key in ("img_ids", "txt_ids")}
    given = {key: inputs[key] for key in ("encoder_hidden_states", "pooled_projections")}
    nothing = map_tensors(lambda value: torch.zeros_like(value[:1]), given)
    denoiser = as_denoiser(model, flow, guidance=2.0, unconditional=nothing, shared=shared)
    x = randn(2, 12, 4)
    plain = as_denoiser(model, flow)
    conditional = plain(x, 0.8, **given, **shared)
    absent = plain(x, 0.8, **map_tensors(lambda value: value.expand(2, *value.shape[1:]), nothing), **shared)
    torch.testing.assert_close(denoiser(x, 0.8, **given), absent + 2 * (conditional - absent), rtol=1e-4, atol=1e-4)
    samples = sample(denoiser, x, Schedule([3.0, 0.5, 0.0]), conditioning=given, skip=AdaptiveSkip(per_sample=True)).samples
    assert torch.isfinite(samples).all()


def test_timesteps_run_between_the_integers() -> None:
    ddpm = diffusers.DDPMScheduler()
    table = ((1 - ddpm.alphas_cumprod) / ddpm.alphas_cumprod).double().sqrt()
    parametrisation = as_denoiser(BY_NAME["UNet2DModel"].model(), ddpm).parametrisation
    times = parametrisation.time(torch.stack((table[0], table[500], (table[500] * table[501]).sqrt(), table[999])))
    torch.testing.assert_close(times, torch.tensor([0, 500, 500.5, 999], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert parametrisation.time(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]


def test_zero_terminal_snr_has_finite_times() -> None:
    ddpm = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    time = as_denoiser(BY_NAME["UNet2DModel"].model(), ddpm).parametrisation.time(torch.tensor([1.0, 1e5]))
    assert torch.isfinite(time).all()


def test_a_learned_variance_is_left_out() -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model = type(case.model())(**{**case.model().config, "out_channels": 8}).eval()
    denoiser = as_denoiser(model, diffusers.DDIMScheduler())
    labels = torch.tensor([1, 2])
    assert denoiser(randn(2, 4, 8, 8), 2.0, class_labels=labels).shape == (2, 4, 8, 8)


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    model, ddpm = BY_NAME["DiTTransformer2DModel"].model(), diffusers.DDIMScheduler()
    x, labels, null = randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([1000])
    plain = as_denoiser(model, ddpm)
    guided = as_denoiser(model, ddpm, guidance=3.0, unconditional={"class_labels": null})
    conditional, absent = plain(x, 2.0, class_labels=labels), plain(x, 2.0, class_labels=null.expand(2))
    torch.testing.assert_close(guided(x, 2.0, class_labels=labels), absent + 3 * (conditional - absent), rtol=1e-4, atol=1e-4)


def test_a_guided_teacher_is_distilled_into_a_student_of_one_call() -> None:
    model, null = BY_NAME["DiTTransformer2DModel"].model(), torch.tensor([1000])
    teacher = as_denoiser(model, diffusers.DDIMScheduler(), guidance=3.0, unconditional={"class_labels": null})
    sim = SIMDistiller(teacher, sample_shape=(4, 8, 8))
    rows: list[int] = []
    sim.generator.model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    labels = {"class_labels": torch.tensor([1, 2, 3])}
    assert math.isfinite(sim.step(3, labels)["gap"])
    sim.sample(3, labels)
    assert rows == [3]
    assert teacher.guidance == 3.0


def conditioned(name: str) -> tuple[ModelDenoiser, dict[str, Any], dict[str, Any]]:
    """A denoiser of two samples, what they are conditioned on, and one row of nothing."""
    case = BY_NAME[name]
    given = {key: value for key, value in case.inputs().items() if key not in ("sample", "hidden_states", "timestep")}
    nothing = map_tensors(lambda value: torch.zeros_like(value[:1]) if value.is_floating_point() else torch.ones_like(value[:1]), given)
    return as_denoiser(case.model(), diffusers.DDPMScheduler()), given, nothing


NESTED = ["UNet2DConditionModel-SDXL", "PixArtTransformer2DModel"]


@pytest.mark.parametrize("name", NESTED)
def test_models_with_dicts_of_conditions_are_guided_and_sampled(name: str) -> None:
    plain, given, nothing = conditioned(name)
    assert isinstance(given["added_cond_kwargs"], dict)
    both = map_tensors(lambda value: value.expand(2, *value.shape[1:]), nothing)
    noise, schedule = randn(2, 4, 8, 8), Schedule([5.0, 1.0, 0.0])
    conditional, absent = plain(noise, 2.0, **given), plain(noise, 2.0, **both)
    assert not torch.allclose(conditional, absent, rtol=1e-3, atol=1e-3)
    guided = as_denoiser(plain.model, diffusers.DDPMScheduler(), guidance=3.0, unconditional=nothing)
    torch.testing.assert_close(guided(noise, 2.0, **given), absent + 3 * (conditional - absent), rtol=1e-4, atol=1e-4)
    outside = sample(plain, noise, schedule, solver="euler", conditioning=given, unconditional=both, guidance=3.0).samples
    inside = sample(guided, noise, schedule, solver="euler", conditioning=given).samples
    torch.testing.assert_close(outside, inside, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NESTED)
def test_dicts_of_conditions_are_gathered_for_the_samples_that_are_computed(name: str) -> None:
    denoiser, given, _ = conditioned(name)
    schedule, skip = Schedule.karras(16, 0.05, 20.0), AdaptiveSkip(0.05, per_sample=True)
    # Samples of unlike sizes decide differently.
    noise = randn(2, 4, 8, 8) * torch.tensor([1.0, 0.05]).view(2, 1, 1, 1)
    result = sample(denoiser, noise, schedule, solver="euler", conditioning=given, skip=skip)
    assert bool((result.skipped[:, 0] != result.skipped[:, 1]).any())
    for row in range(2):
        alone = map_tensors(lambda value, row=row: value[row : row + 1], given)
        single = sample(denoiser, noise[row : row + 1], schedule, solver="euler", conditioning=alone, skip=skip)
        torch.testing.assert_close(result.samples[row : row + 1], single.samples, rtol=1e-3, atol=1e-3)


def test_an_sdxl_like_model_is_scheduled_and_distilled() -> None:
    denoiser, given, _ = conditioned("UNet2DConditionModel-SDXL")
    data = 0.5 * randn(2, 4, 8, 8)
    schedule = optimize_schedule(denoiser, data, 3, sigma_min=0.05, sigma_max=20, knots=5, batch_size=2, conditioning=given)
    assert bool((schedule.sigmas.diff() < 0).all())
    sim = SIMDistiller(denoiser, sample_shape=(4, 8, 8))
    history = Trainer(sim, steps=2, batch_size=2, conditioning=given, progress=False).fit()
    assert all(math.isfinite(value) for value in history["loss"])
    assert sim.sample(2, given).shape == (2, 4, 8, 8)
    given["added_cond_kwargs"] = {**given["added_cond_kwargs"], "text_embeds": torch.zeros(3, 10)}
    with pytest.raises(ValueError, match=r"conditioning\['added_cond_kwargs'\]\['text_embeds'\] must have shape \[2, ...\], got \[3, 10\]"):
        sim.step(2, given)


def test_a_model_in_bfloat16_denoises_float32() -> None:
    case = BY_NAME["UNet2DModel"]
    denoised = as_denoiser(case.model(torch.bfloat16), diffusers.DDPMScheduler())(randn(2, 3, 8, 8), 1.0)
    assert denoised.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((nn.Linear(1, 1), object()), TypeError, "scheduler must be a diffusers scheduler, got object"),
        ((object(), None), TypeError, "model must be a torch.nn.Module"),
        ((nn.Linear(1, 1), diffusers.VQDiffusionScheduler(4)), TypeError, "must have alphas_cumprod, or be FlowMatch... or EDM..."),
        ((nn.Linear(1, 1), diffusers.EDMEulerScheduler(prediction_type="sample")), ValueError, "'epsilon' or 'v_prediction', got 'sample'"),
    ],
)
def test_what_cannot_be_a_denoiser_is_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_denoiser(*arguments)


def test_guidance_alone_and_time_scales_of_no_flow_are_refused() -> None:
    with pytest.raises(ValueError, match="guidance needs unconditional"):
        as_denoiser(nn.Linear(1, 1), diffusers.DDPMScheduler(), guidance=2.0)
    with pytest.raises(ValueError, match="time_scale is for flow models"):
        as_denoiser(nn.Linear(1, 1), diffusers.DDPMScheduler(), time_scale=1.0)


every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_schedules_of_gaussian_data_are_the_geodesics(kind: str) -> None:
    denoiser = as_denoiser(Gaussian(kind, 0.0, 0.5), scheduler(kind), sigma_data=0.5)
    data = 0.5 * randn(200, 1024).double()
    schedule = optimize_schedule(denoiser, data, 6, sigma_min=0.05, sigma_max=20.0, knots=128, batch_size=8)
    exact = geodesic(gaussian_length(0.5), 5, 0.05, 20.0)
    assert schedule.sigmas[:-1].log().tolist() == pytest.approx([math.log(level) for level in exact], abs=0.02)


@every_kind
def test_a_one_step_student_of_a_gaussian_reaches_its_law(kind: str) -> None:
    sim = SIMDistiller(
        as_denoiser(Gaussian(kind, 0.0, 1.0), scheduler(kind), sigma_data=0.5),
        sample_shape=(1,),
        learning_rate=LearningRate(0.05, "linear", 200),
    )
    sim.teacher.model.load_state_dict(Gaussian(kind, 0.6, 0.5).state_dict())
    for _ in range(200):
        metrics = sim.step(256)
    samples = sim.sample(20_000)
    assert samples.mean().item() == pytest.approx(0.6, abs=0.06)
    assert samples.std().item() == pytest.approx(0.5, abs=0.05)
    assert metrics["gap"] < 1e-2


@every_kind
def test_a_few_step_student_of_a_gaussian_keeps_its_law_better_than_the_teacher(kind: str) -> None:
    teacher = as_denoiser(Gaussian(kind, 0.6, 0.5), scheduler(kind), sigma_data=0.5)
    # The noise levels stay within the table of DDPM.
    options: dict[str, Any] = {"num_steps": 4, "sigma_min": 0.02}
    student = MomentMatchingDistiller(teacher, learning_rate=LearningRate(0.03, "linear", 120), shared_batch=True, **options)
    before = MomentMatchingDistiller(teacher, sample_shape=(1,), **options).sample(20_000)
    data = torch.Generator().manual_seed(0)
    for _ in range(120):
        student.step(0.6 + 0.5 * torch.randn(512, 1, dtype=torch.float64, generator=data))
    samples = student.sample(20_000)
    assert samples.mean().item() == pytest.approx(0.6, abs=0.08)
    assert abs(samples.std().item() - 0.5) < 0.6 * abs(before.std().item() - 0.5)


def moved(recipe: SIMDistiller | MomentMatchingDistiller) -> bool:
    """Whether every averaged parameter is another than the teacher's."""
    pairs = zip(recipe.generator.parameters(), recipe.teacher.parameters(), strict=True)
    return all(bool(torch.isfinite(own).all()) and not torch.equal(own, first) for own, first in pairs)


@every_kind
def test_a_patched_model_is_sampled_scheduled_and_distilled(kind: str) -> None:
    model = unet_2d(block_out_channels=(8, 8), attention_head_dim=4)
    patch(model)
    denoiser = as_denoiser(model, scheduler(kind), sigma_data=0.5)
    data = randn(8, 3, 8, 8) * 0.5
    schedule = optimize_schedule(denoiser.eval(), data, 3, sigma_min=0.05, sigma_max=20, knots=5, batch_size=2)
    assert bool((schedule.sigmas.diff() < 0).all())
    result = sample(denoiser, randn(2, 3, 8, 8), schedule, solver="euler")
    assert result.nfe == 3
    assert torch.isfinite(result.samples).all()
    sim = SIMDistiller(denoiser, sample_shape=(3, 8, 8))
    student = MomentMatchingDistiller(denoiser, num_steps=2, sigma_min=0.02)
    for recipe, batch in ((sim, 2), (student, data[:2])):
        assert all(math.isfinite(value) for _ in range(4) for value in recipe.step(batch).values())
        assert moved(recipe)
        assert torch.isfinite(recipe.sample(2)).all()
