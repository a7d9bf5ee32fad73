"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .data import ImageData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#2563eb", "#ea7317", "#1a936f", "#c1121f"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9, color=MUTED)
    axes.tick_params(which="both", labelsize=8, colors=MUTED)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def _readable_log(axes: Axes) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written out: most plots span less than two decades."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})


def grid_image(data: ImageData, samples: Tensor, rows: int, zoom: int | None = None) -> np.ndarray:
    """uint8 [H, W, 3]: samples in `rows` rows, enlarged without smoothing, thin gaps between them."""
    pixels = data.to_pixels(samples)
    if pixels.shape[1] == 1:
        pixels = 1 - pixels if data.name == "digits" else pixels  # digits read best as ink on paper
        pixels = pixels.expand(-1, 3, -1, -1)
    zoom = max(1, 40 // pixels.shape[-1]) if zoom is None else zoom
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    gap = 2
    pixels = torch.nn.functional.pad(pixels, (gap, gap, gap, gap), value=0.86)
    count, channels, height, width = pixels.shape
    columns = count // rows
    board = pixels.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    return (board * 255).round().to(torch.uint8).numpy()


def save_grid(data: ImageData, samples: Tensor, rows: int, path: Path) -> None:
    from PIL import Image

    Image.fromarray(grid_image(data, samples, rows)).save(path)


def overview(data: ImageData, panels: Sequence[tuple[str, str, Tensor]], rows: int, path: Path) -> None:
    """One picture of several (title, subtitle, samples) panels, four in a row."""
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(3.3 * columns, (0.5 + 3.3 * rows / 10) * lines)
    all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in all_axes:
        axes.axis("off")
    for axes, (title, subtitle, samples) in zip(all_axes, panels, strict=False):
        axes.imshow(grid_image(data, samples, rows), interpolation="nearest")
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=15)
        axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=8, color=MUTED)
    save(figure, path)


def schedule_plot(details: dict, rows: dict[str, dict], steps: Sequence[int], path: Path) -> None:
    """Levels of both schedules, the speed they follow, and the Fréchet distance they give."""
    figure = _figure(13, 3.6)
    levels, speed, quality = figure.subplots(1, 3)
    for number, style in zip((min(steps), max(steps)), ("-", ":"), strict=True):
        for kind, colour in (("karras", ORANGE), ("optimised", BLUE)):
            sigmas = np.array(details["levels"][f"{kind}_{number}"])
            sigmas = sigmas[sigmas > 0]
            label = f"{'Karras, rho = 7' if kind == 'karras' else 'optimised'}, {number} steps"
            levels.semilogy(np.linspace(0, 1, len(sigmas)), sigmas, style, marker="o", markersize=4, color=colour, label=label)
    levels.legend(fontsize=8, frameon=False)
    _style(levels, "Noise levels", "share of the steps", "sigma")

    knots, cost = np.array(details["knots"]), np.array(details["cost"])
    centres, rate = np.sqrt(knots[1:] * knots[:-1]), np.sqrt(cost) / -np.diff(np.log(knots))
    speed.semilogx(centres, rate, color=INK, linewidth=1.5)
    for position, (kind, colour) in enumerate((("karras", ORANGE), ("optimised", BLUE))):
        marks = np.array(details["levels"][f"{kind}_{max(steps)}"])
        marks = marks[marks > 0]
        height = -(0.05 + 0.07 * position) * rate.max()
        speed.plot(marks, np.full(len(marks), height), "|", color=colour, markersize=10, markeredgewidth=2)
    _style(speed, f"How fast the score changes; below it the {max(steps)} levels", "sigma", "d length / d ln sigma")

    for kind, colour, label in (("karras", ORANGE, "Karras, rho = 7"), ("optimised", BLUE, "optimised")):
        chosen = [rows[f"{kind}_{n}"] for n in steps]
        quality.semilogy([r["calls"] for r in chosen], [r["frechet"] for r in chosen], "o-", color=colour, label=label)
    _readable_log(quality)
    quality.legend(fontsize=8, frameon=False)
    _style(quality, "Fréchet distance (lower is better)", "network calls (Heun)", "Fréchet distance")
    save(figure, path)


def skip_timeline(details: dict, rows: dict[str, dict], path: Path) -> None:
    """Which steps called the network, one line a rule."""
    figure = _figure(11, 0.62 * len(details["skipped"]) + 0.9)
    axes = figure.subplots()
    names = list(details["skipped"])
    for line, name in enumerate(reversed(names)):
        skipped = details["skipped"][name]
        colour = BLUE if name.startswith("adaptive") else MUTED
        band = (line - 0.31, 0.62)
        for wanted, fill in ((True, "white"), (False, colour)):
            bars = [(step, 0.86) for step, reused in enumerate(skipped) if reused == wanted]
            axes.broken_barh(bars, band, facecolor=fill, edgecolor=colour, linewidth=0.8)
        row = rows[name]
        axes.text(len(skipped) + 0.6, line, f"{row['calls']} calls, {row['psnr']:.1f} dB", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(names)), [rows[name]["label"] for name in reversed(names)], fontsize=9)
    axes.set_xlim(-0.5, details["steps"] * 1.17)
    _style(axes, "Filled: the network ran.  Empty: its last prediction was reused", "step", "")
    axes.grid(False)
    save(figure, path)


def _smooth(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    window = max(1, len(values) // 40)
    kernel = np.ones(window) / window
    return np.arange(len(values) - window + 1) + window / 2, np.convolve(np.asarray(values), kernel, mode="valid")


def loss_curves(panels: Sequence[tuple[str, str, dict[str, list[float]]]], path: Path) -> None:
    """(title, y label, {name: values}) panels side by side; running means over a fortieth of the run."""
    figure = _figure(4.4 * len(panels), 3.4)
    for axes, (title, ylabel, curves) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for colour, (name, values) in zip((BLUE, ORANGE, GREEN, RED), curves.items(), strict=False):
            axes.plot(*_smooth(values), color=colour, linewidth=1.4, label=name)
        if all(value > 0 for values in curves.values() for value in values):
            axes.set_yscale("log")
            _readable_log(axes)
        if len(curves) > 1:
            axes.legend(fontsize=8, frameon=False)
        _style(axes, title, "step", ylabel)
    save(figure, path)


def calls_against_distance(rows: dict[str, dict], floor: float, path: Path) -> None:
    """Every judged row in one plane: network calls against Fréchet distance."""
    figure = _figure(7.5, 4)
    axes = figure.subplots()
    series = (
        ("Karras, Heun", ORANGE, [r for n, r in rows.items() if n.startswith("karras_")]),
        ("Optimised, Heun", BLUE, [r for n, r in rows.items() if n.startswith("optimised_")]),
        ("DPM-Solver++(2M), Karras", MUTED, [r for n, r in rows.items() if n.startswith("teacher_karras_")]),
        ("Moment matching", GREEN, [r for n, r in rows.items() if n.startswith("moment_matching_")]),
        ("SIM", RED, [rows["sim"]]),
    )
    for label, colour, chosen in series:
        chosen = sorted(chosen, key=lambda r: r["calls"])
        axes.loglog([r["calls"] for r in chosen], [r["frechet"] for r in chosen], "o-", color=colour, label=label, markersize=5)
    axes.axhline(rows["teacher"]["frechet"], color=INK, linestyle="--", linewidth=1, label=f"teacher, {rows['teacher']['calls']} calls")
    axes.axhline(floor, color=INK, linestyle=":", linewidth=1, label="floor: training images")
    ticks = [1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    _readable_log(axes)
    axes.legend(fontsize=8, frameon=False)
    _style(axes, "Quality for network calls", "network calls", "Fréchet distance")
    save(figure, path)
