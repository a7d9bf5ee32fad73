"""Adaptive skipping of whole denoisers: the published decisions, in every kind of loop, from one generation to the next."""

from __future__ import annotations

import contextlib
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from fastdiff_kernels.diffusion import AdaptiveSkip, Schedule, sample
from fastdiff_kernels.integrations.diffusers import SkipHandle, as_denoiser, disable_adaptive_skip, enable_adaptive_skip, patch
from tests.diffusion.test_skipping import official_by_lists, tensor_by_lists
from tests.helpers import assert_bitwise
from tests.integrations.models import BY_NAME, dit_pipeline, randn, text_pipeline

# The schedulers' own, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
RULES = {"official": official_by_lists, "tensor": tensor_by_lists}
every_mode = pytest.mark.parametrize(("mode", "threshold"), [("official", 0.05), ("tensor", 0.3)])


class Model(nn.Module):
    """Counts its calls; the output depends on the sample, so that a reused one can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.training = False

    def forward(self, sample: Tensor, timestep: Tensor | float, scale: float = 1.0) -> tuple[Tensor]:
        self.runs += 1
        return (sample * scale,)


def trajectory(steps: int, wobble: float = 0.05) -> list[Tensor]:
    drift = randn(2, 3, 4, 4, seed=1)
    return [drift * k + wobble * (1 if k % 9 == 0 else 0.1) * randn(2, 3, 4, 4, seed=k + 2) for k in range(steps + 1)]


def walk(model: nn.Module, latents: list[Tensor], doubled: bool = False) -> list[Tensor]:
    steps = len(latents) - 1
    with torch.no_grad():
        return [model(torch.cat((x, x)) if doubled else x, torch.tensor(steps - k))[0] for k, x in enumerate(latents[:-1])]


@every_mode
@pytest.mark.parametrize("doubled", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("max_skip", [1, 4])
def test_decisions_are_the_published_ones_on_a_shared_trajectory(mode: str, threshold: float, doubled: bool, max_skip: int) -> None:
    latents, model = trajectory(50), Model()
    handle = enable_adaptive_skip(model, threshold, max_skip, mode)
    outputs = walk(model, latents, doubled)
    expected = RULES[mode](latents, threshold, max_skip)
    assert handle.skipped == expected
    assert 5 < sum(expected) < 45
    assert (handle.calls, handle.computed, handle.saved) == (50, 50 - sum(expected), sum(expected))
    assert model.runs == handle.computed
    for k, skipped in enumerate(expected):
        last = max(i for i in range(k + 1) if not expected[i])
        assert_bitwise(outputs[k][:2], latents[last])
        assert skipped == (last != k)


class NoisePrediction(nn.Module):
    """Smooth in the sample and in time."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        time = timestep.to(sample.dtype).view(-1, *[1] * (sample.dim() - 1)) / 1000
        return (torch.sin(self.slope * sample) + 0.5 * time * sample,)


SOLVERS = {
    "euler": (diffusers.EulerDiscreteScheduler, {}, "ve"),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}, "vp"),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}, "vp"),
}


def levels_of(scheduler: Any) -> Tensor:
    abar = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
    return torch.cat(((1 / abar - 1).sqrt(), torch.zeros(1, dtype=torch.float64)))


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize(
    ("reuse", "space", "threshold", "max_skip"),
    [
        ("extrapolate", "noise", 3e-4, 2),
        ("extrapolate", None, 0.02, 4),
        ("hold", "noise", 1e-3, 2),
        ("hold", "ve", 0.02, 4),
        ("hold", "vp", 0.02, 4),
    ],
)
def test_decisions_and_samples_are_those_of_our_sampler(
    solver: str, reuse: str, space: str | None, threshold: float, max_skip: int
) -> None:
    build, options, own = SOLVERS[solver]
    scheduler, model = (
        build(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", **options),
        NoisePrediction(),
    )
    scheduler.set_timesteps(40)
    sigmas, noise = levels_of(scheduler), randn(2, 3, 4, 4).double()
    rule = AdaptiveSkip(threshold, max_skip, reuse=reuse, space=space or own)
    expected = sample(as_denoiser(model, scheduler), noise, Schedule(sigmas), solver=solver, skip=rule)

    handle = enable_adaptive_skip(model, threshold, max_skip, reuse=reuse, space=space, scheduler=scheduler)
    x = noise * (sigmas[0] if own == "ve" else sigmas[0] / (1 + sigmas[0] ** 2).sqrt())
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t)[0], t, x).prev_sample
    assert handle.skipped == expected.skipped.tolist()
    assert 5 < handle.saved < 36
    torch.testing.assert_close(x, expected.samples, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: None, "reuse='extrapolate' needs a scheduler with alphas_cumprod and prediction_type 'epsilon', got NoneType with None"),
        (diffusers.FlowMatchEulerDiscreteScheduler, "got FlowMatchEulerDiscreteScheduler with None"),
        (lambda: diffusers.DDIMScheduler(prediction_type="v_prediction"), "got DDIMScheduler with 'v_prediction'"),
        (diffusers.HeunDiscreteScheduler, "evaluates once a step, got HeunDiscreteScheduler"),
    ],
)
def test_schedulers_without_a_level_for_each_step_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        enable_adaptive_skip(NoisePrediction(), reuse="extrapolate", scheduler=build())


def test_a_scheduler_put_in_later_is_looked_at_when_a_generation_begins() -> None:
    pytest.importorskip("transformers")
    pipeline = text_pipeline("sd", diffusers.DDIMScheduler(steps_offset=1))
    enable_adaptive_skip(pipeline, 0.05, 2, reuse="extrapolate", space="noise")
    pipeline.scheduler = diffusers.HeunDiscreteScheduler(steps_offset=1)
    with pytest.raises(ValueError, match="reuse='extrapolate' and space='noise' needs a scheduler that evaluates once a step"):
        latents_of(pipeline, randn(1, 4, 8, 8), num_inference_steps=8, guidance_scale=2.0)


def test_a_timestep_that_is_not_the_schedulers_has_no_level() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    model = NoisePrediction()
    enable_adaptive_skip(model, space="vp", scheduler=scheduler)
    with torch.no_grad(), pytest.raises(ValueError, match=r"timestep must be one of the scheduler's, .* got 3\.5"):
        model(randn(1, 2).double(), torch.tensor(3.5))


@pytest.mark.parametrize("build", [diffusers.EulerDiscreteScheduler, diffusers.EDMEulerScheduler])
def test_rescaled_inputs_are_undone(build) -> None:
    scheduler, latents = build(), trajectory(40)
    scheduler.set_timesteps(40)
    model = Model()
    handle = enable_adaptive_skip(model, 0.05, scheduler=scheduler)
    with torch.no_grad():
        for x, t in zip(latents[:-1], scheduler.timesteps, strict=True):
            model(scheduler.scale_model_input(x, t), t)
            scheduler._step_index += 1
    assert handle.skipped == official_by_lists(latents, 0.05, 4)
    assert handle.saved > 5


def test_two_calls_with_the_same_latents_are_one_step() -> None:
    latents, model = trajectory(30), Model()
    handle = enable_adaptive_skip(model, 0.05)
    with torch.no_grad():
        for k, x in enumerate(latents[:-1]):
            conditional, absent = model(x, 30 - k)[0], model(x, 30 - k, scale=-1.0)[0]
            assert_bitwise(absent, -conditional)
    assert handle.skipped == official_by_lists(latents, 0.05, 4)
    assert handle.saved == 2 * sum(handle.skipped) > 0


@pytest.mark.parametrize("change", ["time", "shape", "scheduler"])
def test_each_generation_starts_afresh(change: str) -> None:
    scheduler, model, latents = diffusers.DDIMScheduler(), Model(), trajectory(30)
    handle = enable_adaptive_skip(model, 0.05, scheduler=scheduler)
    scheduler.set_timesteps(30)
    walk(model, latents[:20])
    if change == "shape":
        latents = [x[:1] for x in latents]
    if change == "scheduler":
        scheduler.set_timesteps(30)
    with torch.no_grad():
        for k, x in enumerate(latents[:-1]):
            model(x, (30 if change == "time" else 0) - k)
    assert handle.skipped == official_by_lists(latents, 0.05, 4)
    assert handle.generations == 2


def test_generations_of_one_step_never_reuse() -> None:
    model = Model()
    handle = enable_adaptive_skip(model, 100.0)
    with torch.no_grad():
        for k in range(12):
            assert_bitwise(model(randn(1, 2, seed=k), 999)[0], randn(1, 2, seed=k))
    assert handle.saved == 0


def test_with_gradients_every_call_runs() -> None:
    model = Model()
    handle = enable_adaptive_skip(model, 100.0)
    for k in range(12):
        model(randn(1, 2).requires_grad_(), 12 - k)
    assert handle.saved == 0


def test_changes_in_place_do_not_reach_what_is_reused() -> None:
    latents, model = trajectory(20, wobble=0.0), Model()
    handle = enable_adaptive_skip(model, 0.5)
    with torch.no_grad():
        for k, x in enumerate(latents[:-1]):
            out = model(x.clone(), 20 - k)[0]
            assert_bitwise(out, latents[max(i for i in range(k + 1) if not handle.skipped[i])])
            out.mul_(3)
    assert handle.saved > 0


def test_disabling_gives_the_forward_back_and_enabling_again_counts_afresh() -> None:
    model = Model()
    own = model.forward
    first = enable_adaptive_skip(model, 0.5)
    walk(model, trajectory(20))
    second = enable_adaptive_skip(model, 0.01)
    assert isinstance(second, SkipHandle)
    assert second.calls == 0
    walk(model, trajectory(3))
    assert first.calls == 20
    disable_adaptive_skip(model)
    assert model.forward == own
    assert "forward" not in vars(model)
    disable_adaptive_skip(model)


@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_a_threshold_never_met_changes_nothing_in_any_architecture(name: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    patch(model)
    key = "sample" if "sample" in case.inputs() else "hidden_states"

    def run() -> list[Tensor]:
        with torch.no_grad():
            inputs = case.inputs()
            return [
                case.call(model, inputs={**inputs, key: inputs[key] * (1 + 0.1 * k), "timestep": torch.full((2,), 0.9 - 0.1 * k)})
                for k in range(7)
            ]

    plain = run()
    handle = enable_adaptive_skip(model, 0.0)
    for a, b in zip(run(), plain, strict=True):
        assert_bitwise(a, b)
    assert (handle.calls, handle.saved, handle.generations) == (7, 0, 1)
    enable_adaptive_skip(model, 10.0)
    assert_bitwise(run()[4], plain[3])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_pipeline_without_callbacks_saves_calls_and_forgets_the_last_prompt(guidance: float) -> None:
    pipeline = dit_pipeline()
    runs = []
    pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda *args: runs.append(1))
    handle = enable_adaptive_skip(pipeline, 0.05)

    def images(label: int) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.from_numpy(pipeline([label], guidance, generator, 20, output_type="np").images)

    first, saved = images(1), handle.saved
    assert 0 < saved < 16
    assert (handle.calls, len(runs)) == (20, 20 - saved)
    images(5)
    assert_bitwise(images(1), first)
    assert handle.generations == 3
    disable_adaptive_skip(pipeline)
    images(1)
    assert handle.calls == 60


def latents_of(pipeline: Any, first: Tensor, **given: Any) -> list[Tensor]:
    """The latents before each step of a pipeline's loop and after the last."""
    latents = [first * pipeline.scheduler.init_noise_sigma]

    def note(pipe: Any, step: int, time: Tensor, held: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(held["latents"].clone())
        return held

    pipeline(
        latents=first,
        prompt_embeds=randn(1, 5, 12, seed=2),
        negative_prompt_embeds=randn(1, 5, 12, seed=3),
        callback_on_step_end=note,
        output_type="latent",
        **given,
    )
    return latents


@pytest.mark.parametrize(
    "scheduler", [diffusers.EulerDiscreteScheduler(steps_offset=1), diffusers.DPMSolverMultistepScheduler(steps_offset=1)]
)
@pytest.mark.parametrize("kind", ["inpainting", "pix2pix"])
def test_channels_of_images_and_masks_do_not_decide(kind: str, scheduler: Any) -> None:
    pytest.importorskip("transformers")
    parts = text_pipeline("sd", scheduler, in_channels=9 if kind == "inpainting" else 8).components
    build = diffusers.StableDiffusionInpaintPipeline if kind == "inpainting" else diffusers.StableDiffusionInstructPix2PixPipeline
    pipeline = build(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"image": randn(1, 3, 8, 8, seed=6).sigmoid(), "num_inference_steps": 20, "guidance_scale": 2.0}
    if kind == "inpainting":
        given |= {"mask_image": (torch.arange(64) % 2).float().view(1, 1, 8, 8), "height": 8, "width": 8}
    handle = enable_adaptive_skip(pipeline, 0.03)
    latents = latents_of(pipeline, randn(1, 4, 8, 8), **given)
    assert handle.skipped == official_by_lists(latents, 0.03, 4)
    assert (handle.generations, handle.calls) == (1, 20)
    assert 0 < handle.saved < 16


def test_each_evaluation_of_a_second_order_scheduler_is_a_step_of_one_generation() -> None:
    pytest.importorskip("transformers")
    pipeline = text_pipeline("sd", diffusers.HeunDiscreteScheduler(steps_offset=1))
    handle = enable_adaptive_skip(pipeline, 1.0)
    latents = latents_of(pipeline, randn(1, 4, 8, 8), num_inference_steps=12, guidance_scale=2.0)
    assert handle.skipped == official_by_lists(latents, 1.0, 4)
    assert (handle.generations, handle.calls) == (1, 23)
    assert 0 < handle.saved < 19


def test_pixarts_pipeline_saves_calls_and_forgets_the_last_prompt() -> None:
    pytest.importorskip("transformers")
    pipeline = text_pipeline("pixart", diffusers.DPMSolverMultistepScheduler())
    runs = []
    pipeline.transformer.transformer_blocks[0].register_forward_hook(lambda *args: runs.append(1))
    handle = enable_adaptive_skip(pipeline, 0.05)

    def image(prompt: int) -> Tensor:
        mask = torch.ones(1, 5, dtype=torch.int64)
        return pipeline(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=randn(1, 5, 20, seed=prompt),
            prompt_attention_mask=mask,
            negative_prompt_embeds=randn(1, 5, 20, seed=9),
            negative_prompt_attention_mask=mask,
            num_inference_steps=20,
            height=8,
            width=8,
            use_resolution_binning=False,
            latents=randn(1, 4, 8, 8, seed=4),
            output_type="latent",
        ).images

    first, saved = image(1), handle.saved
    assert 0 < saved < 16
    assert (handle.calls, len(runs)) == (20, 20 - saved)
    assert not torch.equal(image(5), first)
    assert_bitwise(image(1), first)
    assert (handle.generations, handle.calls) == (3, 60)
    disable_adaptive_skip(pipeline)
    assert not torch.equal(image(1), first)
    assert handle.calls == 60


def test_a_compiled_denoiser_is_skipped_as_a_whole() -> None:
    case = BY_NAME["DiTTransformer2DModel"]
    model = case.model()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    handle = enable_adaptive_skip(compiled, 10.0)
    with torch.no_grad():
        for k in range(7):
            case.call(compiled, inputs={**case.inputs(), "timestep": torch.full((2,), 900 - k)})
    assert (handle.calls, handle.computed) == (7, 4)
    disable_adaptive_skip(compiled)
    case.call(compiled)
    assert handle.calls == 7


def test_a_forward_replaced_since_is_not_lost() -> None:
    model = Model()
    own = lambda sample, timestep: (sample,)  # noqa: E731
    model.forward = own
    enable_adaptive_skip(model)
    handled = model.forward
    model.forward = lambda *args: handled(*args)
    with pytest.raises(RuntimeError, match="replaced after skipping was enabled"):
        disable_adaptive_skip(model)
    model.forward = handled
    disable_adaptive_skip(model)
    assert model.forward is own


def test_what_cannot_be_skipped_is_refused() -> None:
    with pytest.raises(TypeError, match="a pipeline with one unet or transformer, got int"):
        enable_adaptive_skip(3)
    with pytest.raises(TypeError, match="must be called with a timestep, and Linear is not"):
        enable_adaptive_skip(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="threshold must be finite and not negative"):
        enable_adaptive_skip(Model(), -1.0)
    with pytest.raises(ValueError, match="reuse must be one of 'hold', 'extrapolate', got 'last'"):
        enable_adaptive_skip(Model(), reuse="last")
    with pytest.raises(ValueError, match="scheduler is the pipeline's own"):
        enable_adaptive_skip(dit_pipeline(), scheduler=diffusers.DDIMScheduler())
    model = Model()
    with contextlib.suppress(AttributeError):
        model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled in place"):
        enable_adaptive_skip(model)
