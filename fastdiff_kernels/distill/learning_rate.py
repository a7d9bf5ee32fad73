"""Learning rates as functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .._checks import check_choice, check_count, check_number


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`, then constant, or a linear or cosine decay that reaches `final` at `total_steps`.

    Args:
        peak: the highest learning rate, > 0.
        decay: "constant", "linear" or "cosine".
        total_steps: where the decay ends; needed by "linear" and "cosine".
        warmup_steps: steps of the linear warm-up; step 0 has peak / (warmup_steps + 1).
        final: the learning rate from total_steps on.
    """

    peak: float
    decay: str = "constant"
    total_steps: int | None = None
    warmup_steps: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.peak, "peak", above=0)
        check_number(self.final, "final", minimum=0)
        check_count(self.warmup_steps, "warmup_steps", 0)
        check_choice(self.decay, "decay", ("constant", "linear", "cosine"))
        if self.decay != "constant" and self.total_steps is None:
            raise ValueError(f"total_steps must be given with decay={self.decay!r}")
        if self.total_steps is not None and check_count(self.total_steps, "total_steps") <= self.warmup_steps:
            raise ValueError(f"total_steps must exceed warmup_steps={self.warmup_steps}, got {self.total_steps}")

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant" or self.total_steps is None:
            return self.peak
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        remaining = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final + (self.peak - self.final) * remaining


def as_learning_rate(value: float | LearningRate, name: str) -> LearningRate:
    """A number is a constant learning rate."""
    return value if isinstance(value, LearningRate) else LearningRate(check_number(value, name, above=0))
