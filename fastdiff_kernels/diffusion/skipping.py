"""Which steps of a sampler need the network, decided from the samples themselves (AdaptiveDiffusion, Ye et al., arXiv 2410.09873)."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from .._checks import check_choice, check_count

WARM_UP_STEPS = 4
CAP_FREE_ENTRIES = 4  # The authors' cap looks at their list of decisions only once it is longer than this.


class SkipState(Protocol):
    """Decisions along one trajectory. `reuse` (bool on the CPU, [1] or [B]) says which samples the next step does without the network."""

    reuse: Tensor

    def update(self, x: Tensor, x_next: Tensor, sigma: float, sigma_next: float, change: Tensor | None = None) -> None:
        """Note a step from x at sigma to x_next at sigma_next, [B, ...]; `change` is mean |x_next - x| per sample [B] where it is known."""


@dataclass(frozen=True)
class AdaptiveSkip:
    """Reuse the network's last noise predictions while the trajectory runs straight.

    mode "official" is the authors' rule, index for index. With d_k = mean |X_k - X_{k-1}| over the batch, X_k the latent after k steps
    and d_1 never used, the step after X_k reuses iff ::

        |(d_k + d_{k-2}) / 2 - d_{k-1}| <= threshold d_{k-1}

    after 4 steps that always compute, with at most max_skip reuses in a row, a cap that holds only from the sixth decision on: the first
    run of reuses can be 5 long whatever max_skip is. (The paper states |third difference| >= threshold |difference|; this is its code.)

    mode "tensor" is the paper's statement: reuse iff mean |X_k - 3 X_{k-1} + 3 X_{k-2} - X_{k-3}| <= threshold mean |X_k - X_{k-1}|, first
    decided once four latents exist, at most max_skip times in a row. Thresholds of the two modes are not interchangeable.

    Args:
        threshold: >= 0. max_skip: >= 1. mode: "official" or "tensor".
        per_sample: decide for each sample by its own means; the network then runs on the gathered samples that need it. Otherwise one
            decision holds for the batch.
        reuse: "hold" repeats the last noise prediction; "extrapolate" continues the last two linearly in the solver's own variable
            (sigma; for dpmpp_2m -ln sigma).
        space: differences are taken of x ("ve") or of x / sqrt(1 + sigma^2) ("vp").

    The state starts afresh with each trajectory and does not grow with its steps.

    Raises:
        TypeError, ValueError: an argument outside of what is listed.
    """

    threshold: float = 0.01
    max_skip: int = 4
    mode: str = "official"
    per_sample: bool = False
    reuse: str = "hold"
    space: str = "ve"

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, Real):
            raise TypeError(f"threshold must be a number, got {type(self.threshold).__name__}")
        if not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise ValueError(f"threshold must be finite and not negative, got {self.threshold}")
        check_count(self.max_skip, "max_skip")
        if not isinstance(self.per_sample, bool):
            raise TypeError(f"per_sample must be a bool, got {type(self.per_sample).__name__}")
        check_choice(self.mode, "mode", ("official", "tensor"))
        check_choice(self.reuse, "reuse", ("hold", "extrapolate"))
        check_choice(self.space, "space", ("ve", "vp"))

    def start(self, x: Tensor, sigma: float) -> SkipState:
        """The state of a new trajectory that begins at x [B, ...] with noise level sigma."""
        return _Official(self, x) if self.mode == "official" else _Tensor(self, x, sigma)


@dataclass(frozen=True)
class FixedSkip:
    """Compute steps 0, every, 2 every, ... and reuse in between: the baseline an adaptive rule has to beat. `reuse` as in AdaptiveSkip."""

    every: int
    reuse: str = "hold"
    per_sample = False

    def __post_init__(self) -> None:
        check_count(self.every, "every")
        check_choice(self.reuse, "reuse", ("hold", "extrapolate"))

    def start(self, x: Tensor, sigma: float) -> SkipState:
        """The state of a new trajectory; x and sigma are not looked at."""
        return _Fixed(self.every)


class _Official:
    def __init__(self, rule: AdaptiveSkip, x: Tensor) -> None:
        self.rule = rule
        self.steps = 0
        self.changes: deque[Tensor] = deque(maxlen=3)  # d_1 has left it by the first decision
        self.reuse, self.run = _no_reuse(rule, x)

    def update(self, x: Tensor, x_next: Tensor, sigma: float, sigma_next: float, change: Tensor | None = None) -> None:
        self.steps += 1
        if change is None or self.rule.space == "vp":
            change = _mean_change(x, x_next, sigma, sigma_next, self.rule.space)
        self.changes.append(_pool(self.rule, change))
        if self.steps < WARM_UP_STEPS:
            return
        entries = self.steps - WARM_UP_STEPS
        d0, d1, d2 = self.changes
        reuse = ops.third_order_skip(d0, d1, d2, self.rule.threshold).cpu()
        if entries > CAP_FREE_ENTRIES:
            reuse &= self.run < min(self.rule.max_skip, entries)
        self.reuse, self.run = reuse, _longer(self.run, reuse)


class _Tensor:
    def __init__(self, rule: AdaptiveSkip, x: Tensor, sigma: float) -> None:
        self.rule = rule
        self.latents: deque[Tensor] = deque([_in_space(x, sigma, rule.space)], maxlen=4)
        self.reuse, self.run = _no_reuse(rule, x)

    def update(self, x: Tensor, x_next: Tensor, sigma: float, sigma_next: float, change: Tensor | None = None) -> None:
        self.latents.append(_in_space(x_next, sigma_next, self.rule.space))
        if len(self.latents) < 4:
            return
        x0, x1, x2, x3 = self.latents
        third, last = (_pool(self.rule, mean) for mean in ops.third_order_difference(x0, x1, x2, x3))
        reuse = (third <= self.rule.threshold * last).cpu() & (self.run < self.rule.max_skip)
        self.reuse, self.run = reuse, _longer(self.run, reuse)


class _Fixed:
    def __init__(self, every: int) -> None:
        self.every = every
        self.steps = 0
        self.reuse = torch.zeros(1, dtype=torch.bool)

    def update(self, x: Tensor, x_next: Tensor, sigma: float, sigma_next: float, change: Tensor | None = None) -> None:
        self.steps += 1
        self.reuse = torch.tensor([self.steps % self.every != 0])


def _no_reuse(rule: AdaptiveSkip, x: Tensor) -> tuple[Tensor, Tensor]:
    decisions = x.shape[0] if rule.per_sample else 1
    return torch.zeros(decisions, dtype=torch.bool), torch.zeros(decisions, dtype=torch.int64)


def _longer(run: Tensor, reuse: Tensor) -> Tensor:
    return torch.where(reuse, run + 1, 0)  # reuses in a row, [1] or [B]


def _pool(rule: AdaptiveSkip, means: Tensor) -> Tensor:
    return means if rule.per_sample else means.mean().reshape(1)


def _in_space(x: Tensor, sigma: float, space: str) -> Tensor:
    return x if space == "ve" else x / math.sqrt(1 + sigma**2)


def _mean_change(x: Tensor, x_next: Tensor, sigma: float, sigma_next: float, space: str) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    change = _in_space(x_next.to(dtype), sigma_next, space) - _in_space(x.to(dtype), sigma, space)
    return change.abs().reshape(x.shape[0], math.prod(x.shape[1:])).mean(1)  # [B]
