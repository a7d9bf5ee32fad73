"""Which steps of a sampler need the network, decided from the samples themselves (AdaptiveDiffusion, Ye et al., arXiv 2410.09873)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from .._checks import check_choice, check_count
from ..reference.skipping import WARM_UP_STEPS


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
        space: differences are taken of x ("ve") or of x / sqrt(1 + sigma^2) ("vp"). Or, beyond the paper, "noise": with the mean noise
            n_k = d_k / h_k over a step of length h_k in sigma, reuse iff h_k |(n_k + n_{k-2}) / 2 - n_{k-1}| <= threshold n_{k-1}. What
            the grid does to the lengths of steps is out of it, so that with reuse="extrapolate" it measures how far a computed prediction
            fell from the line, and threshold is the error of x tolerated for it. For mode "official" alone.

    The state starts afresh with each trajectory, lies beside the latents and does not grow with the steps: `ops.solver_step` decides in
    the pass that makes the step, in float64. On a GPU its few numbers travel to the host by an asynchronous copy, and the host waits for
    that copy, since whether the network is called depends on it; the first steps, which always compute, wait for nothing.

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
        # The ops take Python's own numbers.
        object.__setattr__(self, "threshold", float(self.threshold))
        check_count(self.max_skip, "max_skip")
        if not isinstance(self.per_sample, bool):
            raise TypeError(f"per_sample must be a bool, got {type(self.per_sample).__name__}")
        check_choice(self.mode, "mode", ("official", "tensor"))
        check_choice(self.reuse, "reuse", ("hold", "extrapolate"))
        check_choice(self.space, "space", ("ve", "vp", "noise"))
        if self.space == "noise" and self.mode != "official":
            raise ValueError(f"space 'noise' needs mode 'official', got {self.mode!r}")

    @property
    def first_decision(self) -> int:
        """After how many steps the first decision is taken."""
        return WARM_UP_STEPS if self.mode == "official" else 3


@dataclass(frozen=True)
class FixedSkip:
    """Compute steps 0, every, 2 every, ... and reuse in between: the baseline an adaptive rule has to beat. `reuse` as in AdaptiveSkip."""

    every: int
    reuse: str = "hold"
    per_sample = False

    def __post_init__(self) -> None:
        check_count(self.every, "every")
        check_choice(self.reuse, "reuse", ("hold", "extrapolate"))

    def computes(self, step: int) -> bool:
        """Whether the network runs in this step, the first being 0."""
        return step % self.every == 0
