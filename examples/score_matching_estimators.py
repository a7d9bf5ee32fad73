"""What it takes to learn a score: exact and sliced score matching, finite differences, denoising and local curvature smoothing.

Trains one small network with each, for as many steps, on a two-dimensional checkerboard and on scikit-learn's 8 x 8 digits; then measures
on one network how long each one's gradient takes, turn by turn, and how noisy it is, and judges the samples. Writes one table and one
picture. A method that has been trained is taken from the folder again.

    python examples/score_matching_estimators.py [--fast] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff_kernels.demo.data import load_digits, stratified_split
from fastdiff_kernels.demo.features import frechet_distance, train_feature_extractor
from fastdiff_kernels.diffusion import EDMPrecond, Schedule, edm_weight, sample
from fastdiff_kernels.distill import LogNormal
from fastdiff_kernels.distill import score_estimators as estimators

SIGMA_MIN, SIGMA_MAX = 0.02, 20.0
LOCAL_RATIO = 2.0
BOARD = 0.9
"""The checkerboard fills [-BOARD, BOARD]^2, which makes its standard deviation about the 0.5 that EDM's preconditioning expects."""


class Network(nn.Module):
    """A residual perceptron of a flat sample, `waves` octaves of waves along its elements, and its noise level."""

    def __init__(self, width: int, elements: int, waves: int, depth: int = 3) -> None:
        super().__init__()
        self.waves = waves
        self.enter, self.leave = nn.Linear(elements * (1 + 2 * waves), width), nn.Linear(width, elements)
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(width, width)) for _ in range(depth))
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(-2, 6))

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        angles = noise_level[:, None] * self.frequencies
        level = self.level(torch.cat((angles.sin(), angles.cos()), dim=1).to(x.dtype))
        angles = [2**octave * x for octave in range(self.waves)]
        hidden = self.enter(torch.cat((x, *(wave(a) for a in angles for wave in (torch.sin, torch.cos))), dim=1))
        for layer in self.layers:
            hidden = hidden + layer(hidden + level)
        return self.leave(nn.functional.silu(hidden))


@dataclass(frozen=True)
class Draw:
    """What a step draws before its loss: clean samples and their noise levels, and how to draw more."""

    clean: Tensor  # [B, N]
    sigma: Tensor  # [B]
    seed: int
    rng: torch.Generator

    def noisy(self, sigma: Tensor) -> Tensor:
        return self.clean + sigma[:, None] * torch.randn(self.clean.shape, generator=self.rng)


Score = Callable[[Tensor], Tensor]


def exact(score: Score, draw: Draw) -> Tensor:
    return estimators.exact_score_matching(score, draw.noisy(draw.sigma))


def sliced(score: Score, draw: Draw) -> Tensor:
    return estimators.sliced_score_matching(score, draw.noisy(draw.sigma), generator=draw.rng)


def finite_differences(score: Score, draw: Draw) -> Tensor:
    return estimators.finite_difference_score_matching(score, draw.noisy(draw.sigma), radius=0.1 * draw.sigma, generator=draw.rng)


def denoising(score: Score, draw: Draw) -> Tensor:
    return estimators.denoising_score_matching(score, draw.clean, draw.sigma, generator=draw.rng)


def smoothing(score: Score, draw: Draw) -> Tensor:
    """All noise is that of the smoothing: denoising score matching but for a constant."""
    return estimators.local_curvature_smoothing(score, draw.clean, draw.sigma, draw.seed)


def local(score: Score, draw: Draw, antithetic: bool = False) -> Tensor:
    """Noise of the data first and a smoothing of its own after it, draw.sigma being both together."""
    forward = draw.sigma / (1 + LOCAL_RATIO**2) ** 0.5
    return estimators.local_curvature_smoothing(score, draw.noisy(forward), LOCAL_RATIO * forward, draw.seed, antithetic=antithetic)


def local_pairs(score: Score, draw: Draw) -> Tensor:
    return local(score, draw, antithetic=True)


METHODS: dict[str, Callable[[Score, Draw], Tensor]] = {
    "exact trace": exact,
    "sliced": sliced,
    "finite differences": finite_differences,
    "denoising": denoising,
    "LCSS": smoothing,
    "LCSS, local": local,
    "LCSS, local pairs": local_pairs,
}


def losses(method: Callable[[Score, Draw], Tensor], denoiser: EDMPrecond, draw: Draw) -> Tensor:
    """The method's losses [B], all with the weight that makes their gradient denoising's under EDM's weight."""

    def score(x: Tensor) -> Tensor:
        sigma = draw.sigma.repeat(x.shape[0] // draw.sigma.shape[0])  # pairs come in one batch
        return (denoiser(x, sigma) - x) / sigma.square()[:, None]

    return 2 * draw.sigma**4 * edm_weight(draw.sigma, denoiser.sigma_data) * method(score, draw)


@dataclass(frozen=True)
class Task:
    """A data set, a network for it, and how its samples are judged."""

    name: str
    quality: str
    draw: Callable[[int, torch.Generator], Tensor]
    judge: Callable[[Tensor], float]
    elements: int
    width: int
    waves: int
    batch: int
    samples: int
    law: LogNormal
    steps: int

    def denoiser(self) -> EDMPrecond:
        torch.manual_seed(0)
        return EDMPrecond(Network(self.width, self.elements, self.waves))

    def steps_of(self, name: str) -> int:
        """The trace of 64 x 64 Jacobians costs 64 backward passes: it gets a twentieth of the steps."""
        return max(1, self.steps // 20) if name == "exact trace" and self.elements > 8 else self.steps

    def one_draw(self, rng: torch.Generator) -> Draw:
        seed = int(torch.randint(2**62, (), generator=rng))
        return Draw(self.draw(self.batch, rng), self.law(self.batch, rng), seed, rng)


def checkerboard(count: int, rng: torch.Generator) -> Tensor:
    """Uniform on the dark squares of a 4 x 4 board."""
    row = torch.randint(4, (count,), generator=rng)
    column = 2 * torch.randint(2, (count,), generator=rng) + row % 2
    corner = torch.stack((row, column), dim=1)
    return ((corner + torch.rand(count, 2, generator=rng)) / 2 - 1) * BOARD


def total_variation(samples: Tensor) -> float:
    """Between the samples and the data, each in 16 x 16 cells: 0 where equal, 1 where nothing is shared; 0.04 by chance alone."""
    cell = ((samples / BOARD + 1) * 8).floor().long()
    inside = ((cell >= 0) & (cell < 16)).all(1)
    share = torch.bincount((16 * cell[:, 0] + cell[:, 1])[inside], minlength=256).double() / len(samples)
    square = torch.arange(16) // 4
    truth = ((square[:, None] + square) % 2 == 0).double().flatten() / 128
    return float((share - truth).clamp(min=0).sum() + (~inside).double().mean())


def checkerboard_task(fast: bool) -> Task:
    law = LogNormal(-2.0, 1.2)
    return Task("checkerboard", "total variation", checkerboard, total_variation, 2, 128, 3, 512, 10_000, law, 500 if fast else 2500)


def digits_task(fast: bool) -> Task:
    data = load_digits()
    split = stratified_split(data.labels, seed=0)
    train, held_out = data.images[split.train], data.images[split.held_out]
    extractor = train_feature_extractor(train, data.labels[split.train], data.num_classes, epochs=5 if fast else 30)
    features = extractor.features(held_out)

    def draw(count: int, rng: torch.Generator) -> Tensor:
        return train[torch.randint(len(train), (count,), generator=rng)].flatten(1)

    def judge(samples: Tensor) -> float:
        return frechet_distance(extractor.features(samples.reshape(-1, 1, 8, 8)), features)

    return Task("digits", "Fréchet distance", draw, judge, 64, 256, 0, 128, len(held_out), LogNormal(-1.2, 1.2), 300 if fast else 1000)


def loss_of(task: Task, denoiser: EDMPrecond, name: str, rng: torch.Generator) -> Tensor:
    return losses(METHODS[name], denoiser, task.one_draw(rng)).mean() / task.elements


def train(task: Task, name: str, steps: int) -> EDMPrecond:
    """The averaged denoiser."""
    denoiser, rng = task.denoiser(), torch.Generator().manual_seed(1)
    average = copy.deepcopy(denoiser)
    optimiser = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in tqdm(range(steps), desc=f"{task.name}, {name}", leave=False):
        loss = loss_of(task, denoiser, name, rng)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for mean, now in zip(average.parameters(), denoiser.parameters(), strict=True):
                mean.lerp_(now, max(0.01, 1 / (2 + step)))
    return average.eval()


def gradient(task: Task, denoiser: EDMPrecond, name: str, rng: torch.Generator) -> Tensor:
    """Of one batch's loss by all parameters, flat."""
    found = torch.autograd.grad(loss_of(task, denoiser, name, rng), list(denoiser.parameters()))
    return torch.cat([g.flatten() for g in found])


def gradient_times(task: Task, denoiser: EDMPrecond, turns: int) -> dict[str, float]:
    """The median milliseconds of each method's gradient, one after another in every turn, so that the machine's moods hit all alike."""
    rng = torch.Generator().manual_seed(4)
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in tqdm(range(turns), desc=f"{task.name}, times", leave=False):
        for name, times in taken.items():
            start = time.perf_counter()
            gradient(task, denoiser, name, rng)
            times.append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in taken.items()}


def gradient_noise(task: Task, denoiser: EDMPrecond, name: str, draws: int) -> float:
    """The standard deviation of a batch's gradient, all parameters together. Its mean is the same for every method."""
    rng = torch.Generator().manual_seed(2)
    return float(torch.stack([gradient(task, denoiser, name, rng) for _ in range(draws)]).double().var(0).sum().sqrt())


def draw_samples(task: Task, denoiser: EDMPrecond) -> Tensor:
    noise = torch.randn(task.samples, task.elements, generator=torch.Generator().manual_seed(3))
    return sample(denoiser, noise, Schedule.karras(20, SIGMA_MIN, SIGMA_MAX)).samples


def run_task(task: Task, out: Path) -> tuple[list[dict], dict[str, Tensor]]:
    """The rows of the table, and each method's samples."""
    rows, samples, denoisers = [], {}, {}
    for name in METHODS:
        count = task.steps_of(name)
        path = out / f"{task.name}-{name.replace(', ', '-').replace(' ', '-')}-{count}.pt"
        if path.exists():
            denoiser = task.denoiser()
            denoiser.load_state_dict(torch.load(path))
        else:
            denoiser = train(task, name, count)
            torch.save(denoiser.state_dict(), path)
        denoisers[name], samples[name] = denoiser.eval(), draw_samples(task, denoiser)
        rows.append({"method": name, "steps": count, "quality": task.judge(samples[name])})
    # Where all are compared: a network that has learnt something, and one that none of them but denoising has been trained on.
    judged, draws = denoisers["denoising"], 8 if task.elements > 8 else 64
    times = gradient_times(task, judged, draws)
    for row in tqdm(rows, desc=f"{task.name}, gradients", leave=False):
        row["ms"], row["noise"] = times[row["method"]], gradient_noise(task, judged, row["method"], draws)
    base = next(row["noise"] for row in rows if row["method"] == "denoising")
    for row in rows:
        row["noise"] /= base
    return rows, samples


def table(results: dict[str, list[dict]], tasks: list[Task]) -> str:
    cells = " | ".join(f"{t.name}: steps | ms a gradient | gradient noise | {t.quality}" for t in tasks)
    lines = [f"| method | {cells} |", f"| --- |{' ---: |' * 4 * len(tasks)}"]
    for i, name in enumerate(METHODS):
        rows = [results[t.name][i] for t in tasks]
        lines.append(
            f"| {name} | " + " | ".join(f"{r['steps']} | {r['ms']:.2f} | {r['noise']:.2f} | {r['quality']:.3f}" for r in rows) + " |"
        )
    return "\n".join(lines)


def picture(results: dict[str, list[dict]], samples: dict[str, dict[str, Tensor]], tasks: list[Task], path: Path) -> None:
    figure = Figure(figsize=(2.3 * len(METHODS), 5.4), layout="constrained")
    axes = figure.subplots(2, len(METHODS))
    for row, task in enumerate(tasks):
        for column, result in enumerate(results[task.name]):
            axis = axes[row, column]
            drawn = samples[task.name][result["method"]]
            if task.name == "checkerboard":
                limit = 1.15 * BOARD
                axis.hist2d(*drawn.T.numpy(), bins=72, range=((-limit, limit), (-limit, limit)), cmap="magma")
            else:
                tiles = nn.functional.pad(drawn[:36].reshape(6, 6, 8, 8), (1, 1, 1, 1), value=-0.6).permute(0, 2, 1, 3).reshape(60, 60)
                axis.imshow(tiles, cmap="gray", vmin=-0.6, vmax=1.2)
            axis.set_title(result["method"] if row == 0 else "", fontsize=11)
            axis.set_xlabel(
                f"{result['quality']:.3f} {task.quality}\n{result['ms']:.1f} ms a gradient, {result['steps']} steps", fontsize=8
            )
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="fewer steps: shows that it runs, not how well each method does")
    parser.add_argument("--out", type=Path, default=Path("score_matching_estimators"), help="folder for networks, table and picture")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = [checkerboard_task(options.fast), digits_task(options.fast)]
    results, samples = {}, {}
    for task in tasks:
        results[task.name], samples[task.name] = run_task(task, options.out)
    text = table(results, tasks)
    print(f"{text}\n\nGradient noise: the standard deviation of a batch's gradient, denoising's being 1.")
    (options.out / "table.md").write_text(text + "\n")
    picture(results, samples, tasks, options.out / "estimators.png")


if __name__ == "__main__":
    main()
