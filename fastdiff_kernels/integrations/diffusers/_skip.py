"""Adaptive skipping of a whole denoiser's calls, from what a sampling loop passes to it."""

from __future__ import annotations

import inspect
import math
from collections import deque
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from ... import ops
from ...diffusion.skipping import AdaptiveSkip
from ...reference.skipping import REUSE, STATE_WIDTH
from ._levels import check_levels, level, on_line

_DENOISERS = ("unet", "transformer")
_HANDLE = "_fastdiff_skip"


class SkipHandle:
    """What adaptive skipping did and does to one denoiser.

    Attributes:
        rule: threshold, max_skip, mode and reuse. space: where differences are taken, None for the latents as the loop holds them.
        calls: how often the denoiser was called. computed: how often it ran. saved: the difference.
        steps, skipped: steps of the current generation, and for each whether it reused (list of bool). A step has several calls where
            the conditional and the unconditional prediction are made one after the other.
        generations: how many trajectories were begun.
    """

    def __init__(self, model: nn.Module, rule: AdaptiveSkip, space: str | None, pipeline: Any, scheduler: Any) -> None:
        self.model = model
        self.rule, self.space = rule, space
        self.pipeline = pipeline
        self._scheduler = scheduler
        self.before: Any = vars(model).get("forward")
        self.run = model.forward
        inner: Any = getattr(model, "_orig_mod", model)
        self._config = getattr(inner, "config", None)
        names = list(inspect.signature(type(inner).forward).parameters)[1:]
        self.input_name = next((name for name in ("sample", "hidden_states") if name in names), names[0])
        if "timestep" not in names:
            raise TypeError(f"model must be called with a timestep, and {type(model).__name__} is not")
        self.places = (names.index(self.input_name), names.index("timestep"))
        self.by_level = " and ".join(
            f"{name}={value!r}" for name, value in (("reuse", rule.reuse), ("space", space)) if value not in ("hold", None)
        )
        self._check_scheduler()
        self.calls = self.computed = self.generations = 0
        self.reset()

    @property
    def saved(self) -> int:
        return self.calls - self.computed

    @property
    def steps(self) -> int:
        return len(self.skipped)

    @property
    def scheduler(self) -> Any:
        return self._scheduler if self.pipeline is None else self.pipeline.scheduler

    def _check_scheduler(self) -> None:
        if self.by_level:
            check_levels(self.scheduler, self.by_level)

    def reset(self) -> None:
        """Forgets the trajectory; the next call begins another. Done by itself when a generation begins."""
        self.latents: deque[Tensor] = deque(maxlen=4)  # the newest first, unscaled
        self.state: Tensor | None = None
        self.input: Tensor | None = None
        self.time: float | None = None
        self.sigma = math.nan  # of the newest call, where the options ask for levels
        self.timesteps: object = None
        self.branch = 0
        self.outputs: dict[int, deque[tuple[float, Any]]] = {}  # by branch: the last computed and the levels they were computed at
        self.skipped: list[bool] = []

    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the model's forward: runs it, or returns what it returned last, or the line through the last two."""
        self.calls += 1
        if torch.is_grad_enabled():
            self.reset()
            self.computed += 1
            return self.run(*args, **kwargs)
        x, time = (
            kwargs[name] if name in kwargs else args[place] for name, place in zip((self.input_name, "timestep"), self.places, strict=True)
        )
        self._begin(x, time)
        if self.skipped[-1] and self.branch in self.outputs:
            return self._reused()
        self.computed += 1
        output = self.run(*args, **kwargs)
        kept = 2 if self.rule.reuse == "extrapolate" else 1
        self.outputs.setdefault(self.branch, deque(maxlen=kept)).append((self.sigma, _copied(output)))
        return output

    def _reused(self) -> Any:
        outputs = self.outputs[self.branch]
        if len(outputs) < 2:
            return _copied(outputs[-1][1])
        (older_at, older), (newest_at, newest) = ((on_line(self.scheduler, sigma), output) for sigma, output in outputs)
        factor = (on_line(self.scheduler, self.sigma) - older_at) / (newest_at - older_at)
        return tree_map(lambda a, b: torch.lerp(a, b, factor) if isinstance(a, Tensor) else b, older, newest)

    def _begin(self, x: Tensor, timestep: Any) -> None:
        """Places the call on its trajectory: another branch of the same step, the next step, or a new generation."""
        time = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        last, timesteps = self.input, getattr(self.scheduler, "timesteps", None)
        alike = last is not None and (last.shape, last.dtype, last.device) == (x.shape, x.dtype, x.device)
        if alike and time == self.time and timesteps is self.timesteps and torch.equal(x, last):  # type: ignore[arg-type]
            self.branch += 1
            return
        # Only schedulers with two evaluations a step come back to a time with another sample.
        repeats = time == self.time and getattr(self.scheduler, "order", 1) > 1
        if not alike or timesteps is not self.timesteps or self.time is None or not (time < self.time or repeats):
            self.reset()
            self._check_scheduler()
            self.generations += 1
        self.input, self.time, self.timesteps, self.branch = x.detach().clone(), time, timesteps, 0
        self._decide(x.detach(), timestep)

    def _decide(self, x: Tensor, timestep: Any) -> None:
        last, rule = self.sigma, self.rule
        if self.by_level:
            self.sigma = level(self.scheduler, cast(float, self.time))
        self.latents.appendleft(self._unscaled(x, timestep))
        latents, length = self.latents, last - self.sigma if rule.space == "noise" else 1.0
        if self.state is None:
            self.state = x.new_zeros((1, STATE_WIDTH), dtype=torch.float64)
        else:
            # A step to the level 0 ends at the denoised sample, exactly: it stands for whatever step the host's scheduler took.
            self.state = ops.solver_step(
                latents[1],
                1.0,
                0.0,
                denoised=latents[0],
                state=self.state,
                mode=rule.mode,
                threshold=rule.threshold / length,
                max_skip=rule.max_skip,
                scales=(1 / length, 1 / length, 1.0, 1.0),
                before=(latents[2], latents[3]) if rule.mode == "tensor" and len(latents) == 4 else None,
            ).state
        # Before the first decision there is nothing to wait for.
        self.skipped.append(self.steps >= rule.first_decision and bool(self.state[0, REUSE]))

    def _unscaled(self, x: Tensor, timestep: Any) -> Tensor:
        """The latents in the space asked for, or as the loop holds them, which some schedulers divide before the model sees them."""
        x = x[:, : self._latent_channels(x)]
        if self.space is not None:
            # A model of noise predictions is given those of the variance-preserving process, whatever its loop holds.
            return x.clone() if self.space == "vp" else x * math.sqrt(1 + self.sigma**2)
        scale = getattr(self.scheduler, "scale_model_input", None)
        if scale is None:
            return x.clone()
        time = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
        factor = float(scale(torch.ones(1, dtype=torch.float64), time))
        return x.clone() if factor == 1 else x / factor

    def _latent_channels(self, x: Tensor) -> int:
        """How many channels are the loop's; those of images and masks (inpainting, instruct-pix2pix) follow, which nothing rescales."""
        given, returned = (getattr(self._config, name, None) for name in ("in_channels", "out_channels"))
        appended = x.dim() >= 4 and given == x.shape[1] and isinstance(returned, int)
        return min(returned, x.shape[1]) if appended else x.shape[1]  # type: ignore[type-var, return-value]


def enable_adaptive_skip(
    model_or_pipeline: Any,
    threshold: float = 0.01,
    max_skip: int = 4,
    mode: str = "official",
    *,
    reuse: str = "hold",
    space: str | None = None,
    scheduler: Any = None,
) -> SkipHandle:
    """Lets a denoiser return its last output while the trajectory runs straight (AdaptiveDiffusion, Ye et al., arXiv 2410.09873).

    It acts on the calls of the whole model, from the latents that the sampling loop passes, and so needs neither callbacks nor a known
    architecture. A generation begins where the timesteps do not fall, where the latents' shape changes, or where the scheduler was set
    anew; a doubled batch under guidance is one call; two calls with the same latents are two branches of one step, and decided together.
    With gradients enabled every call runs. What is held is the model's output, whatever its prediction type. Of an input with more
    channels than the model returns, the first are the latents and decide; what follows is image or mask. With a scheduler of second order
    each evaluation is a step, since the loop makes an iteration of each.

    `reuse="extrapolate"` and a `space` go by the noise level sigma of each step and need a scheduler that names it: one with
    alphas_cumprod, prediction_type "epsilon" and one evaluation a step. The model's output is then the noise prediction of
    `diffusion.AdaptiveSkip`, before guidance, which is linear; with DDIM, Euler or DPM-Solver++(2M) decisions and samples are those of
    `diffusion.sample`.

    Args:
        model_or_pipeline: a pipeline with a `unet` or a `transformer`, or the model, compiled by `torch.compile` or not.
        threshold, max_skip, mode: as of `diffusion.AdaptiveSkip`.
        reuse: "hold" returns the last output; "extrapolate" the line through the last two computed, in sigma, or in -ln sigma for the
            solvers of the DPM-Solver family.
        space: "ve", "vp" or "noise", as of `diffusion.AdaptiveSkip`; None takes differences of the latents as the loop holds them.
        scheduler: with a model, the scheduler of the loop, where that rescales the latents (Euler, EDM) or sigma is asked for; a pipeline's
            is its own.

    Returns:
        SkipHandle, which counts. Enabling again replaces the rule and starts counting afresh.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range; a scheduler that names no sigma, where that is needed, also
            when a generation begins with one put in its place; a model compiled in place by `model.compile()`, whose calls no longer pass
            through its forward.
    """
    rule = AdaptiveSkip(threshold=threshold, max_skip=max_skip, mode=mode, reuse=reuse, space="ve" if space is None else space)
    pipeline, model = _denoiser(model_or_pipeline)
    if pipeline is not None and scheduler is not None:
        raise ValueError("scheduler is the pipeline's own; give one only with a model")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model was compiled in place by model.compile(); use torch.compile(model), whose calls can be skipped as a whole")
    _disable(model)
    handle = SkipHandle(model, rule, space, pipeline, scheduler)
    model.forward = handle.forward
    vars(model)[_HANDLE] = handle
    return handle


def disable_adaptive_skip(model_or_pipeline: Any) -> None:
    """Undoes `enable_adaptive_skip`; does nothing where it was not called.

    Raises:
        TypeError: as there. RuntimeError: something replaced the model's forward since (offloading hooks); undo that first.
    """
    _disable(_denoiser(model_or_pipeline)[1])


def _disable(model: Any) -> None:
    if _HANDLE not in vars(model):
        return
    handle: SkipHandle = vars(model)[_HANDLE]
    if getattr(model.forward, "__self__", None) is not handle:
        raise RuntimeError("the model's forward was replaced after skipping was enabled, by hooks (offloading); remove those first")
    if handle.before is None:
        del model.forward
    else:
        model.forward = handle.before
    del vars(model)[_HANDLE]


def _denoiser(model_or_pipeline: Any) -> tuple[Any, Any]:
    if isinstance(model_or_pipeline, nn.Module):
        return None, model_or_pipeline
    found = [getattr(model_or_pipeline, name, None) for name in _DENOISERS]
    models = [model for model in found if isinstance(model, nn.Module)]
    if len(models) != 1 or not hasattr(model_or_pipeline, "scheduler"):
        raise TypeError(
            f"model_or_pipeline must be a model or a pipeline with one unet or transformer, got {type(model_or_pipeline).__name__}"
        )
    if getattr(model_or_pipeline, "transformer_2", None) is not None:
        raise TypeError(f"{type(model_or_pipeline).__name__} has two denoisers: enable skipping on each, with scheduler=pipeline.scheduler")
    return model_or_pipeline, models[0]


def _copied(output: Any) -> Any:
    # Loops may change what a model returned in place.
    return tree_map_only(Tensor, torch.clone, output)
