"""Everything that decides what a demo run computes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field

from .data import ImageData


@dataclass(frozen=True)
class Training:
    """One training run: Adam, learning rate with warm-up and decay to 0, averaged weights."""

    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float
    decay: str = "cosine"
    warmup_steps: int = 50


@dataclass(frozen=True)
class Settings:
    """A demo run. The defaults are the full run; `fast()` is the small one.

    Every Fréchet distance is the mean over ``frechet_sets`` sample sets of as many samples as there are held-out images, and over
    ``few_call_sets`` where the sampler takes at most eight calls and so costs little. ``skip_trials`` are pairs of a grid of noise levels
    ("linspace", that of Stable Diffusion, or "karras") and how a skipped step reuses predictions.
    """

    seed: int = 0
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    sigma_min: float = 0.02
    sigma_max: float = 80.0
    teacher: Training = Training(steps=1200, batch_size=64, learning_rate=2e-3, ema_decay=0.998)
    lcss: Training = Training(steps=1200, batch_size=64, learning_rate=2e-3, ema_decay=0.998)
    lcss_local_ratio: float = 2.0
    teacher_steps: int = 18
    schedule_steps: tuple[int, ...] = (4, 6, 8, 10)
    schedule_knots: int = 256
    skip_steps: int = 50
    skip_solver: str = "euler"
    skip_trials: tuple[tuple[str, str], ...] = (("linspace", "hold"), ("linspace", "extrapolate"), ("karras", "hold"))
    skip_threshold: float = 0.02
    skip_max: int = 4
    sim: Training = Training(steps=450, batch_size=64, learning_rate=3e-4, ema_decay=0.99, decay="linear", warmup_steps=0)
    sim_sigma_init: float = 2.5
    sim_c: float = 0.1
    moment_matching: Training = Training(steps=300, batch_size=64, learning_rate=3e-4, ema_decay=0.99, decay="linear", warmup_steps=0)
    moment_matching_steps: tuple[int, ...] = (8, 4, 2, 1)
    feature_epochs: int = 30
    frechet_sets: int = 2
    few_call_sets: int = 8
    floor_splits: int = 40
    grid_rows: int = 4
    name: str = field(default="full")

    @classmethod
    def fast(cls, seed: int = 0) -> Settings:
        """The same stages in under 90 seconds on two cores: it shows that everything runs, not what it can reach."""
        quick = Training(steps=200, batch_size=64, learning_rate=2e-3, ema_decay=0.98, warmup_steps=10)
        short = Training(steps=40, batch_size=32, learning_rate=3e-4, ema_decay=0.95, warmup_steps=5)
        return cls(
            seed=seed,
            channels=16,
            teacher=quick,
            lcss=quick,
            schedule_knots=64,
            skip_trials=(("linspace", "hold"), ("linspace", "extrapolate")),
            sim=short,
            moment_matching=short,
            feature_epochs=10,
            frechet_sets=1,
            few_call_sets=1,
            floor_splits=10,
            grid_rows=2,
            name="fast",
        )

    def fingerprint(self, data: ImageData) -> str:
        """Equal for runs whose finished stages can stand in for each other."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode())
        digest.update(data.images.numpy().tobytes() + data.labels.numpy().tobytes())
        return digest.hexdigest()[:16]
