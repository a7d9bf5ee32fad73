"""How long the run will take, from a few timed network calls."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .data import ImageData
from .settings import Settings, Training
from .stages import FEW_CALLS, new_denoiser

# Work of one training step over one of the teacher's: forward and backward passes counted, backward as two forwards.
STEP_COST = {"score": 1.0, "sim": 11 / 3, "moment_matching": 5 / 3}


def _seconds(run: Callable[[], object], repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def predict(settings: Settings, data: ImageData, samples: int) -> dict[str, float]:
    """Seconds of each stage. `samples` is how many samples one sample set has."""
    denoiser = new_denoiser(settings, data)
    batch = settings.teacher.batch_size

    def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.ones(count, *data.sample_shape), torch.ones(count), torch.zeros(count, dtype=torch.int64)

    def train() -> None:
        x, sigma, labels = inputs(batch)
        denoiser(x, sigma, class_labels=labels).sum().backward()

    @torch.no_grad()
    def call() -> None:
        x, sigma, labels = inputs(samples)
        denoiser(x, sigma, class_labels=labels)

    train_seconds, call_seconds = _seconds(train) / batch, _seconds(call, 3)

    def training(kind: str, plan: Training) -> float:
        return plan.steps * plan.batch_size * STEP_COST[kind] * train_seconds

    def judged(calls: float, sets: int = settings.frechet_sets) -> float:
        return calls * sets * call_seconds

    heun = sum(2 * steps - 1 for steps in settings.schedule_steps)
    few = sum(FEW_CALLS) + sum(calls for calls in FEW_CALLS if calls > 2)
    # Each grid is run in full, each rule and its two baselines with about 16 calls.
    skip_calls = settings.skip_steps * len({grid for grid, _ in settings.skip_trials}) + 3 * 16 * len(settings.skip_trials)
    plan = {
        "teacher": training("score", settings.teacher) + judged(2 * settings.teacher_steps - 1),
        "lcss": training("score", settings.lcss) + judged(2 * settings.teacher_steps - 1),
        "schedule": judged(2 * heun) + judged(few, settings.few_call_sets) + settings.schedule_knots * 128 / samples * call_seconds,
        "skipping": judged(skip_calls),
        "sim": training("sim", settings.sim) + judged(1, settings.few_call_sets),
    }
    for steps in settings.moment_matching_steps:
        plan[f"moment_matching_{steps}"] = training("moment_matching", settings.moment_matching) + judged(steps, settings.few_call_sets)
    return plan
