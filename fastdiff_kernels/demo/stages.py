"""The five stages of the demo. Each trains or samples, and returns rows, curves and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..diffusion import AdaptiveSkip, EDMPrecond, Schedule, optimize_schedule
from ..distill import LearningRate, MomentMatchingDistiller, Recipe, ScoreTrainer, SIMDistiller, Trainer
from ..nn import UNet
from .data import ImageData
from .judge import Judge, Verdict
from .samplers import EvenSkip, Sampler, ancestral, one_call, psnr, solve
from .settings import Settings, Training

FEW_CALLS = (1, 2, 4, 8)
GRIDS = {"linspace": "SD grid", "karras": "Karras grid"}


@dataclass
class Stage:
    """What a stage hands on: table rows by name, loss curves, further numbers, and the sample grids."""

    rows: dict[str, dict] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    grids: dict[str, Tensor] = field(default_factory=dict)
    networks: dict[str, nn.Module] = field(default_factory=dict)


@dataclass
class Bench:
    """What every stage works with. ``report(stage, share)`` is told how much of a stage's training is done."""

    settings: Settings
    data: ImageData
    judge: Judge
    checkpoints: Path
    report: Callable[[str, float], None]
    networks: dict[str, EDMPrecond] = field(default_factory=dict)
    results: dict[str, Stage] = field(default_factory=dict)

    def grid_labels(self) -> Tensor:
        """[rows * columns]: a column a class, at most ten of them."""
        columns = min(10, self.data.num_classes) if self.data.num_classes > 1 else 10
        return (torch.arange(columns) % self.data.num_classes).repeat(self.settings.grid_rows)

    def grid_noise(self) -> Tensor:
        """The initial noise of every picture, so that pictures can be compared one by one."""
        generator = torch.Generator().manual_seed(self.settings.seed + 77)
        return torch.randn(len(self.grid_labels()), *self.data.sample_shape, generator=generator)

    def picture(self, make: Callable[[Tensor], Sampler]) -> Tensor:
        """`make(labels)` -> sampler, run on the noise of the pictures."""
        return make(self.grid_labels())(self.grid_noise(), 0)[0]

    def judged(
        self, label: str, method: str, make: Callable[[Tensor], Sampler], baselines: tuple[str, ...] = (), sets: int | None = None
    ) -> dict:
        """A table row: the sampler judged on the held-out labels."""
        return row(label, method, self.judge.judge(make(self.judge.labels), sets), baselines)

    def train(self, name: str, recipe: Recipe, training: Training, every: int = 100) -> dict[str, list[float]]:
        """Run the recipe on the training images; it continues from its own checkpoint if the run was interrupted."""
        trainer = Trainer(
            recipe,
            self.judge.images,
            steps=training.steps,
            batch_size=min(training.batch_size, len(self.judge.images)),
            conditioning={"class_labels": self.judge.train_labels},
            checkpoint=self.checkpoints / f"{name}.pt",
            checkpoint_every=every,
            progress=False,
            log=lambda step, metrics: self.report(name, (step + 1) / training.steps),
            seed=self.settings.seed,
        )
        return trainer.fit()


def row(label: str, method: str, verdict: Verdict, baselines: tuple[str, ...] = ()) -> dict:
    return {"label": label, "method": method, **verdict.as_row(), "baselines": list(baselines)}


def new_denoiser(settings: Settings, data: ImageData) -> EDMPrecond:
    """The score network of every stage, freshly initialised from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = UNet(
            data.sample_shape[0],
            channels=settings.channels,
            multipliers=settings.multipliers,
            blocks=settings.blocks,
            num_classes=data.num_classes,
        )
    denoiser = EDMPrecond(network)
    return denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it


def learning_rate(training: Training) -> LearningRate:
    return LearningRate(training.learning_rate, training.decay, training.steps, training.warmup_steps)


def karras(settings: Settings, steps: int) -> Schedule:
    return Schedule.karras(steps, settings.sigma_min, settings.sigma_max)


def train_teacher(bench: Bench) -> Stage:
    """Stage 1a: a class-conditional teacher by denoising score matching."""
    return _train_score(bench, "teacher", bench.settings.teacher, {"loss": "dsm"}, "Teacher (DSM)", ())


def train_lcss(bench: Bench) -> Stage:
    """Stage 1b: the same network by local curvature smoothing, reading A."""
    options = {"loss": "lcss", "reading": "A", "local_ratio": bench.settings.lcss_local_ratio}
    return _train_score(bench, "lcss", bench.settings.lcss, options, "LCSS, reading A", ("teacher",))


def _train_score(bench: Bench, name: str, training: Training, options: dict, label: str, baselines: tuple[str, ...]) -> Stage:
    settings = bench.settings
    recipe = ScoreTrainer(
        new_denoiser(settings, bench.data),
        learning_rate=learning_rate(training),
        betas=(0.9, 0.99),
        ema_decay=training.ema_decay,
        seed=settings.seed,
        **options,
    )
    history = bench.train(name, recipe, training)
    denoiser = recipe.generator
    schedule = karras(settings, settings.teacher_steps)

    def make(labels: Tensor) -> Sampler:
        return solve(denoiser, labels, schedule, "heun")

    stage = Stage(curves={"loss": history["loss"]}, networks={name: denoiser})
    stage.rows[name] = bench.judged(f"{label}, {settings.teacher_steps} Heun steps", "teacher", make, baselines)
    stage.grids[name] = bench.picture(make)
    return stage


def optimise_schedule(bench: Bench) -> Stage:
    """Stage 2: levels from the teacher's own scores against Karras rho=7, and what the teacher does with very few calls."""
    settings, teacher = bench.settings, bench.networks["teacher"]
    start = time.perf_counter()
    fine = optimize_schedule(
        teacher,
        bench.judge.images,
        max(settings.schedule_steps),
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        knots=settings.schedule_knots,
        conditioning={"class_labels": bench.judge.train_labels},
        seed=settings.seed,
    )
    stage = Stage()
    stage.details["seconds_to_optimise"] = time.perf_counter() - start
    stage.details["length"] = fine.length
    knots, cost = fine.knots, fine.cost
    assert knots is not None, "an optimised schedule knows its grid"
    assert cost is not None, "and its costs"
    stage.details["knots"], stage.details["cost"] = knots.tolist(), cost.tolist()
    stage.details["levels"] = {}

    def optimised(steps: int) -> Schedule:
        # One fine estimate serves every number of steps.
        levels = ops.integrate_schedule(knots, cost, steps - 1) if steps > 1 else knots[:1]
        return Schedule(torch.cat((levels, levels.new_zeros(1))))

    for steps in settings.schedule_steps:
        for kind, label, schedule in (("karras", "Karras rho=7", karras(settings, steps)), ("optimised", "Optimised", optimised(steps))):
            make = _solver(teacher, schedule, "heun")
            name = f"{kind}_{steps}"
            baselines = (f"karras_{steps}",) if kind == "optimised" else ()
            stage.rows[name] = bench.judged(f"{label}, {steps} Heun steps", "schedule", make, baselines)
            stage.details["levels"][name] = schedule.sigmas.tolist()
            if steps == min(settings.schedule_steps):
                stage.grids[name] = bench.picture(make)
    for calls in FEW_CALLS:
        for kind, schedule in (("karras", karras(settings, calls)), ("optimised", optimised(calls))):
            if calls <= 2 and kind == "optimised":
                continue  # its levels are the two ends, as Karras's are
            solver = "euler" if calls == 1 else "dpmpp_2m"
            label = f"Teacher, {calls} {'Euler step' if calls == 1 else 'DPM-Solver++ steps'}" + (f", {kind}" if calls > 2 else "")
            stage.rows[f"teacher_{kind}_{calls}_calls"] = bench.judged(
                label, "teacher, few calls", _solver(teacher, schedule, solver), sets=settings.few_call_sets
            )
    return stage


def _solver(denoiser: nn.Module, schedule: Schedule, solver: str) -> Callable[[Tensor], Sampler]:
    return lambda labels: solve(denoiser, labels, schedule, solver)


def skip_steps(bench: Bench) -> Stage:
    """Stage 3: AdaptiveSkip on long trajectories, beside an even stride and plainly fewer steps at the same number of calls."""
    settings = bench.settings
    stage = Stage(details={"steps": settings.skip_steps, "solver": settings.skip_solver, "skipped": {}})
    full: dict[str, Tensor] = {}
    for grid, reuse in settings.skip_trials:
        if grid not in full:
            full[grid] = _skip_row(bench, stage, f"full_{grid}", f"All {settings.skip_steps} steps, {GRIDS[grid]}", grid).samples
        _skip_trial(bench, stage, grid, reuse, full[grid])
    return stage


def _skip_trial(bench: Bench, stage: Stage, grid: str, reuse: str, full: Tensor) -> None:
    settings = bench.settings
    names = {kind: f"{kind}_{grid}_{reuse}" for kind in ("adaptive", "even", "fewer")}
    rule = AdaptiveSkip(settings.skip_threshold, settings.skip_max, reuse=reuse)
    label = f"AdaptiveSkip, {reuse}, {GRIDS[grid]}"
    adaptive = _skip_row(bench, stage, names["adaptive"], label, grid, rule, baselines=(names["even"], names["fewer"]))
    even = EvenSkip(every=1, reuse=reuse, calls=adaptive.calls, steps=settings.skip_steps)
    verdicts = {
        "adaptive": adaptive,
        "even": _skip_row(bench, stage, names["even"], f"Even stride, {reuse}, {GRIDS[grid]}", grid, even),
        "fewer": _skip_row(bench, stage, names["fewer"], f"{adaptive.calls} plain steps, {GRIDS[grid]}", grid, steps=adaptive.calls),
    }
    for kind, verdict in verdicts.items():
        stage.rows[names[kind]]["psnr"] = psnr(verdict.samples, full, bench.data.scale)


def _skip_row(
    bench: Bench,
    stage: Stage,
    name: str,
    label: str,
    grid: str,
    skip: AdaptiveSkip | EvenSkip | None = None,
    *,
    steps: int | None = None,
    baselines: tuple[str, ...] = (),
) -> Verdict:
    """Judge one long trajectory; its row, its pattern of skipped steps and, for rows that are no baseline, its picture go to `stage`."""
    steps = bench.settings.skip_steps if steps is None else steps
    schedule = karras(bench.settings, steps) if grid == "karras" else Schedule.scaled_linear(steps)
    patterns: list[list[bool]] = []

    def make(labels: Tensor) -> Sampler:
        return solve(bench.networks["teacher"], labels, schedule, bench.settings.skip_solver, skip, patterns)

    verdict = bench.judge.judge(make(bench.judge.labels))
    stage.rows[name] = row(label, "skipping", verdict, baselines)
    if skip is not None:
        stage.details["skipped"][name] = patterns[0]
    if baselines or name.startswith("full"):
        stage.grids[name] = bench.picture(make)
    return verdict


def distil_sim(bench: Bench) -> Stage:
    """Stage 4a: one step by Score Implicit Matching."""
    settings = bench.settings
    training = settings.sim
    recipe = SIMDistiller(
        bench.networks["teacher"],
        sample_shape=bench.data.sample_shape,
        sigma_init=settings.sim_sigma_init,
        learning_rate=learning_rate(training),
        c=settings.sim_c,
        ema_decay=training.ema_decay,
        seed=settings.seed,
    )
    history = bench.train("sim", recipe, training)
    generator = recipe.generator

    def make(labels: Tensor) -> Sampler:
        return one_call(generator, labels, settings.sim_sigma_init)

    stage = Stage(curves={"gap": history["gap"], "fake_loss": history["fake_loss"]}, networks={"sim": generator})
    stage.rows["sim"] = bench.judged("SIM", "distilled", make, few_call_baselines(1), settings.few_call_sets)
    stage.grids["sim"] = bench.picture(make)
    return stage


def distil_moment_matching(bench: Bench, steps: int) -> Stage:
    """Stage 4b: `steps` steps by moment matching."""
    settings = bench.settings
    training = settings.moment_matching
    recipe = MomentMatchingDistiller(
        bench.networks["teacher"],
        num_steps=steps,
        learning_rate=learning_rate(training),
        sigma_min=settings.sigma_min,
        sigma_max=settings.sigma_max,
        ema_decay=training.ema_decay,
        seed=settings.seed,
    )
    name = f"moment_matching_{steps}"
    history = bench.train(name, recipe, training)
    generator = recipe.generator
    sigmas = recipe.sigma(torch.arange(steps, 0, -1) / steps).tolist()

    def make(labels: Tensor) -> Sampler:
        return ancestral(generator, labels, sigmas, settings.seed)

    stage = Stage(curves={"gap": history["gap"]}, networks={name: generator})
    stage.rows[name] = bench.judged(f"Moment matching, k={steps}", "distilled", make, few_call_baselines(steps), settings.few_call_sets)
    stage.grids[name] = bench.picture(make)
    return stage


def few_call_baselines(calls: int) -> tuple[str, ...]:
    """Rows of the undistilled teacher at the same number of network calls."""
    if calls not in FEW_CALLS:
        return ()
    kinds = ("karras",) if calls <= 2 else ("karras", "optimised")
    return tuple(f"teacher_{kind}_{calls}_calls" for kind in kinds)
