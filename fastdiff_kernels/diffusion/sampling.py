"""From noise to samples along a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from ._checks import check_samples
from ._progress import progress_bar
from .guidance import check_conditioning
from .prediction import Predictor
from .schedule import Schedule
from .skipping import AdaptiveSkip, FixedSkip
from .solvers import SOLVERS
from .trajectory import Trajectory


@dataclass(frozen=True)
class SampleResult:
    """What `sample` returns.

    Attributes:
        samples: x at the schedule's last level, [B, ...], noise's dtype.
        nfe: network calls. A batch doubled for guidance is one call, and so is one gathered from the samples that need it.
        skipped: which steps ran without the network, bool on the CPU: [steps], or [steps, B] where decisions were taken per sample.
        nfe_per_sample: how many of the calls each sample was in, int64 [B] on the CPU; equal to nfe but where decisions are per sample.
    """

    samples: Tensor
    nfe: int
    skipped: Tensor
    nfe_per_sample: Tensor


@torch.no_grad()
def sample(
    denoiser: Callable[..., Tensor],
    noise: Tensor,
    schedule: Schedule,
    *,
    solver: str = "heun",
    conditioning: Mapping[str, object] | None = None,
    unconditional: Mapping[str, object] | None = None,
    guidance: float = 1.0,
    skip: AdaptiveSkip | FixedSkip | None = None,
    progress: bool = False,
) -> SampleResult:
    """Solve dx/dsigma = (x - D(x, sigma)) / sigma from x = sigma_0 noise along the schedule's levels.

    Args:
        denoiser: `denoiser(x, sigma, **conditioning)` -> E[x0 | x] for unscaled x [B, ...] and sigma [B] float32 (float64 for float64 x).
            Put it in evaluation mode yourself.
        noise: standard normal, [B, ...]; scaled by `schedule.sigmas[0]` here. Its dtype is the trajectory's.
        schedule: the levels. Where the last is not 0 the samples are left with that much noise.
        solver: "euler"; "heun", second order, two calls a step and one for a step to 0; "dpmpp_2m", second order, one call a step.
            "ddim" is "euler": for unscaled x, DDIM's x_next = D + sigma_next (x - D) / sigma is the same step.
        conditioning: keyword arguments of the denoiser, tensors [B, ...] or scalars, for example `{"class_labels": labels}`, or dicts of
            such.
        unconditional: the same keys for the unconditional prediction; not evaluated where guidance is 1.
        guidance: D = D_uncond + guidance (D_cond - D_uncond), from one call on a doubled batch.
        skip: reuse of noise predictions (x - D) / sigma, D after guidance, for whole steps. The last evaluation of the last computed
            step is the one reused; a Heun step reuses in both of its evaluations.
        progress: show a progress bar (needs tqdm).

    Returns:
        SampleResult. No gradient flows through it.

    Raises:
        TypeError: an argument of the wrong kind; a denoiser that returns another dtype than x's.
        ValueError: an unknown solver; guidance other than 1 without `unconditional`; conditioning whose rows or keys do not match;
            a denoiser that returns another shape than x's.
    """
    check_samples(noise, "noise")
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable, got {type(denoiser).__name__}")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, got {type(schedule).__name__}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))}, got {solver!r}")
    if not (skip is None or isinstance(skip, (AdaptiveSkip, FixedSkip))):
        raise TypeError(f"skip must be an AdaptiveSkip, a FixedSkip or None, got {type(skip).__name__}")
    _check_guidance(guidance, unconditional)

    batch = noise.shape[0]
    conditional = check_conditioning(conditioning, batch, "conditioning")
    other = None if unconditional is None or guidance == 1 else check_conditioning(unconditional, batch, "unconditional")
    predictor = Predictor(denoiser, batch, conditional, other)
    step = SOLVERS[solver]()

    levels = schedule.sigmas.tolist()
    x = noise * levels[0]
    trajectory = Trajectory(predictor, float(guidance), skip, x)
    per_sample = skip is not None and skip.per_sample
    skipped = torch.zeros((schedule.num_steps, batch) if per_sample else schedule.num_steps, dtype=torch.bool)
    for index, (sigma, sigma_next) in enumerate(progress_bar(list(pairwise(levels)), progress, "sampling")):
        reuse = trajectory.begin()
        skipped[index] = reuse if per_sample else reuse[0]
        x = step(trajectory, x, sigma, sigma_next)
    return SampleResult(x, predictor.nfe, skipped, predictor.evaluations)


def _check_guidance(guidance: float, unconditional: Mapping[str, object] | None) -> None:
    if isinstance(guidance, bool) or not isinstance(guidance, Real):
        raise TypeError(f"guidance must be a number, got {type(guidance).__name__}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if guidance != 1 and unconditional is None:
        raise ValueError(f"guidance {guidance} needs `unconditional`, the conditioning of the unconditional prediction")
