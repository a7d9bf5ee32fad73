"""What a skipped step should do: hold the last noise prediction or continue it, and against what that has to hold its own.

Trains a score network on scikit-learn's 8 x 8 digits, then samples with 50 steps of Euler, DDIM and DPM-Solver++(2M) on a grid uniform in
time (Stable Diffusion's) and on Karras', and compares at equal network calls, in PSNR against the full trajectory: AdaptiveDiffusion's rule
with reuse="hold" and "extrapolate", the latter also with at most 2 reuses in a row and with space="noise", evenly spread calls, and plainly
fewer steps. Writes a table and a picture, whose last row says why: what the rule looks at, and what it costs to reuse a prediction.

    python examples/skip_reuse.py [--fast] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import bisect
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from fastdiff_kernels.demo.data import load_digits
from fastdiff_kernels.demo.samplers import EvenSkip, psnr
from fastdiff_kernels.diffusion import AdaptiveSkip, EDMPrecond, FixedSkip, Schedule, sample
from fastdiff_kernels.distill import LearningRate, ScoreTrainer, Trainer
from fastdiff_kernels.nn import UNet

STEPS = 50
SIGMA_MIN, SIGMA_MAX = 0.02, 80.0
GRIDS: dict[str, Callable[[int], Schedule]] = {
    "uniform": Schedule.scaled_linear,
    "Karras": lambda steps: Schedule.karras(steps, SIGMA_MIN, SIGMA_MAX),
}
# The solver, and the space its pipelines hold their latents in, where the rule takes its differences.
SOLVERS = {"Euler": ("euler", "ve"), "DDIM": ("ddim", "vp"), "DPM++(2M)": ("dpmpp_2m", "vp")}
METHODS = {
    "by noise, at most 2": ("#1a936f", "s", "-"),
    "adaptive, at most 2": ("#c1121f", "s", ":"),
    "adaptive, extrapolate": ("#c1121f", "o", "-"),
    "adaptive, hold": ("#2563eb", "o", "-"),
    "even, extrapolate": ("#ea7317", "", "--"),
    "even, hold": ("#7b8794", "", "--"),
    "fewer steps": ("#1f2933", "", ":"),
}
WHY = {"the rule's measure": "#1f2933", "error of hold": "#2563eb", "error of extrapolate": "#c1121f"}
BUDGETS = (14, 17, 20, 25, 30)
Curve = dict[int, float]  # network calls -> PSNR


def train(steps: int, channels: int) -> tuple[EDMPrecond, float]:
    """A class-conditional denoiser of the digits, and a pixel in units of the data."""
    torch.manual_seed(0)
    data = load_digits()
    denoiser = EDMPrecond(UNet(1, channels=channels, multipliers=(1, 2), blocks=1, num_classes=10))
    rate = LearningRate(2e-3, "cosine", total_steps=steps, warmup_steps=min(50, steps // 4))
    recipe = ScoreTrainer(denoiser, loss="dsm", learning_rate=rate, betas=(0.9, 0.99), ema_decay=0.998 if steps > 1000 else 0.98)
    Trainer(recipe, data.images, steps=steps, batch_size=64, conditioning={"class_labels": data.labels}).fit()
    return recipe.generator.eval(), data.scale


class Comparison:
    """Samples of one solver on one grid, judged against the trajectory that computes every step."""

    def __init__(self, denoiser: nn.Module, scale: float, solver: str, space: str, grid: Callable[[int], Schedule], samples: int) -> None:
        self.denoiser, self.scale, self.solver, self.space, self.grid = denoiser, scale, solver, space, grid
        self.noise = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.labels = torch.arange(samples) % 10
        self.full = self._sample(STEPS)[0]

    def _sample(self, steps: int, skip: AdaptiveSkip | FixedSkip | None = None) -> tuple[Tensor, int]:
        given = {"class_labels": self.labels}
        result = sample(self.denoiser, self.noise, self.grid(steps), solver=self.solver, conditioning=given, skip=skip)
        return result.samples, result.nfe

    def _judge(self, steps: int, skip: AdaptiveSkip | FixedSkip | None = None) -> tuple[int, float]:
        samples, calls = self._sample(steps, skip)
        return calls, psnr(samples, self.full, self.scale)

    def why(self) -> dict[str, list[float]]:
        """Along the full Euler trajectory, from the third step on: the rule's measure, and the error that a reused prediction makes."""
        noises: list[Tensor] = []
        latents: list[Tensor] = []

        def record(x: Tensor, sigma: Tensor, **conditioning: Tensor) -> Tensor:
            denoised = self.denoiser(x, sigma, **conditioning)
            noises.append((x - denoised) / sigma[0])
            latents.append(x)
            return denoised

        schedule = self.grid(STEPS)
        latents.append(sample(record, self.noise, schedule, solver="euler", conditioning={"class_labels": self.labels}).samples)
        sigmas = schedule.sigmas.tolist()
        d = [mean(after - before) for before, after in pairwise(latents)]
        found: dict[str, list[float]] = {name: [] for name in WHY}
        for k in range(2, STEPS):
            ahead = (sigmas[k] - sigmas[k - 1]) / (sigmas[k - 1] - sigmas[k - 2])
            line = noises[k - 1] + ahead * (noises[k - 1] - noises[k - 2])
            step = sigmas[k] - sigmas[k + 1]
            values = (
                abs((d[k] + d[k - 2]) / 2 - d[k - 1]) / d[k - 1],
                step * mean(noises[k] - noises[k - 1]),
                step * mean(noises[k] - line),
            )
            for name, value in zip(WHY, values, strict=True):
                found[name].append(value)
        return found

    def curves(self, thresholds: list[float], budgets: tuple[int, ...]) -> Iterator[tuple[str, Curve]]:
        """A curve a method: adaptive by threshold, the others by how many calls they are given."""
        for name, rules in {
            "by noise, at most 2": [AdaptiveSkip(t / 100, 2, reuse="extrapolate", space="noise") for t in thresholds],
            "adaptive, at most 2": [AdaptiveSkip(t, 2, reuse="extrapolate", space=self.space) for t in thresholds],
            "adaptive, extrapolate": [AdaptiveSkip(t, reuse="extrapolate", space=self.space) for t in thresholds],
            "adaptive, hold": [AdaptiveSkip(t, reuse="hold", space=self.space) for t in thresholds],
        }.items():
            judged = (self._judge(STEPS, rule) for rule in rules)
            yield name, {calls: quality for calls, quality in judged if calls < STEPS}
        for reuse in ("extrapolate", "hold"):
            even = {n: EvenSkip(every=1, reuse=reuse, calls=n, steps=STEPS) for n in budgets}
            yield f"even, {reuse}", {n: self._judge(STEPS, rule)[1] for n, rule in even.items()}
        yield "fewer steps", {n: self._judge(n)[1] for n in budgets}


def mean(x: Tensor) -> float:
    return float(x.abs().mean())


def at_most(curve: Curve, budget: int) -> float | None:
    """The quality of the run with the most calls that stays within the budget."""
    calls = sorted(curve)
    index = bisect.bisect_right(calls, budget)
    return curve[calls[index - 1]] if index else None


def table(results: dict[tuple[str, str], dict[str, Curve]]) -> str:
    lines = [
        f"PSNR (dB) against all {STEPS} steps with at most so many network calls; * is the best of a column",
        f"{'':36}" + "".join(f"{budget:>8}" for budget in BUDGETS),
    ]
    for (solver, grid), curves in results.items():
        rows = {name: [at_most(curve, budget) for budget in BUDGETS] for name, curve in curves.items()}
        best = [max((row[i] or 0.0) for row in rows.values()) for i in range(len(BUDGETS))]
        for name, row in rows.items():
            cells = ("       -" if q is None else f"{q:7.1f}{'*' if q == top else ' '}" for q, top in zip(row, best, strict=True))
            lines.append(f"{solver:10}{grid:9}{name:23}" + "".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines)


def picture(results: dict[tuple[str, str], dict[str, Curve]], reasons: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(SOLVERS), 3.4 * (len(GRIDS) + 1)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(len(GRIDS), 1))
    axes = above.subplots(len(GRIDS), len(SOLVERS), sharex=True, squeeze=False)
    for column, solver in enumerate(SOLVERS):
        for row, grid in enumerate(GRIDS):
            panel = axes[row][column]
            for name, curve in results[solver, grid].items():
                color, marker, line = METHODS[name]
                calls = sorted(curve)
                panel.plot(calls, [curve[n] for n in calls], color=color, marker=marker, markersize=4, linestyle=line, label=name)
            panel.set_title(f"{solver}, {grid}", loc="left", fontsize=10, fontweight="bold")
            panel.set(xlim=(11, 40), ylim=(25, 60))
    for panel in axes[-1]:
        panel.set_xlabel(f"network calls, of {STEPS} steps")
    for panels in axes:
        panels[0].set_ylabel("PSNR against all steps (dB)")
    above.legend(*axes[0][0].get_legend_handles_labels(), fontsize=9, loc="outside upper center", ncols=len(METHODS))
    causes = below.subplots(1, len(GRIDS), sharey=True)
    for panel, (grid, lines) in zip(causes, reasons.items(), strict=True):
        for name, values in lines.items():
            panel.semilogy(range(2, STEPS), values, color=WHY[name], linestyle="-" if "error" in name else "--", label=name)
        panel.set_title(f"Euler, {grid}: what the rule sees and what reuse costs", loc="left", fontsize=10, fontweight="bold")
        panel.set_xlabel("step")
    causes[0].legend(fontsize=8, loc="upper left")
    for panel in (*axes.flat, *causes):
        panel.grid(True, color="#e4e7eb")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--fast", action="store_true", help="a small network, few samples and few settings: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/skip_reuse"), help="folder of table.txt and skip_reuse.png")
    args = parser.parse_args(argv)
    denoiser, scale = train(150 if args.fast else 1200, 16 if args.fast else 32)
    thresholds = [0.01, 0.02, 0.1] if args.fast else [0.005, 0.007, 0.01, 0.014, 0.02, 0.05, 0.2]
    budgets = BUDGETS[::2] if args.fast else (13, *BUDGETS, 36)
    results, reasons = {}, {}
    for solver, grid in tqdm([(s, g) for s in SOLVERS for g in GRIDS], desc="solver and grid"):
        comparison = Comparison(denoiser, scale, *SOLVERS[solver], GRIDS[grid], 10 if args.fast else 50)
        results[solver, grid] = dict(comparison.curves(thresholds, budgets))
        if solver == "Euler":
            reasons[grid] = comparison.why()
    args.out.mkdir(parents=True, exist_ok=True)
    text = table(results)
    (args.out / "table.txt").write_text(text)
    picture(results, reasons, args.out / "skip_reuse.png")
    print(f"\n{text}\n{args.out / 'table.txt'}, {args.out / 'skip_reuse.png'}")


if __name__ == "__main__":
    main()
