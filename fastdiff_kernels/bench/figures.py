"""Figures of measured rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .rows import Row

_COLOURS = {"eager": "#888888", "compile": "#d98324", "ours": "#1f6fb2"}
_OTHERS = ("#5a9e4b", "#8e5ea2", "#b0413e", "#3a7d7c")


def speedup_figures(cases: Sequence[dict[str, Row]], folder: Path, name: str) -> list[Path]:
    """Bars for every op: how many times faster than eager each provider is, a case a group."""
    by_op: dict[str, list[dict[str, Row]]] = {}
    for providers in cases:
        by_op.setdefault(providers["eager"].op, []).append(providers)
    paths = {op: folder / f"{name}_{''.join(c if c.isalnum() else '_' for c in op)}.png" for op in by_op}
    return [_speedups(op, own, paths[op]) for op, own in by_op.items()]


def _speedups(op: str, cases: Sequence[dict[str, Row]], path: Path) -> Path:
    import matplotlib.pyplot as plt

    names = sorted({name for providers in cases for name in providers if name != "eager"}, key=lambda n: (n != "compile", n == "ours", n))
    colours = dict(zip([n for n in names if n not in _COLOURS], _OTHERS * len(names), strict=False)) | _COLOURS
    height = 1 / (len(names) + 0.7)
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.17 * len(cases) * (max(len(names), 2) + 0.7)), layout="constrained")
    for j, provider in enumerate(names):
        have = [(i, providers[provider].x_eager) for i, providers in enumerate(cases) if provider in providers]
        places = [i + (j - (len(names) - 1) / 2) * height for i, _ in have]
        # From 1, so that what loses goes to the other side.
        axes.barh(places, [x - 1 for _, x in have], height, left=1, label=provider, color=colours[provider])
        for place, (_, x) in zip(places, have, strict=True):
            axes.annotate(
                f"{x:.2f}", (x, place), xytext=(3 if x >= 1 else -3, 0), textcoords="offset points",
                va="center", ha="left" if x >= 1 else "right", fontsize=8,
            )  # fmt: skip
    axes.axvline(1, color=_COLOURS["eager"], linewidth=1)
    labels = [_label(providers["eager"]) for providers in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xscale("log", base=2)
    speedups = [row.x_eager for providers in cases for row in providers.values()]
    axes.set_xlim(0.75 * min(0.8, *speedups), 1.4 * max(2.0, *speedups))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(f"{op}: times as fast as eager PyTorch, turn by turn in one run", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", frameon=False, fontsize=8, ncols=len(names))
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _label(row: Row) -> str:
    """A case's network above its shape, dtype and mode."""
    what = " ".join(part for part in row.case[3:] if part)
    return f"{row.network}\n{what}" if row.network else what


def cost_figures(rows: Sequence[Row], folder: Path, name: str) -> list[Path]:
    """Lines: time against one size, for every op and size that was swept; a sweep's shape reads like "C=1152"."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    sweeps: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        sweeps.setdefault((row.op, row.shape.partition("=")[0], row.dtype, row.mode), []).append(row)
    paths = []
    for (op, variable, dtype, mode), swept in sweeps.items():
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for i, provider in enumerate(dict.fromkeys(row.provider for row in swept)):
            own = [row for row in swept if row.provider == provider]
            line = sorted((float(row.shape.partition("=")[2]), row.p50_ms, row.p20_ms, row.p80_ms) for row in own)
            sizes, middle, low, high = zip(*line, strict=True)
            colour = _COLOURS.get(provider) or _OTHERS[i % len(_OTHERS)]
            axes.loglog(sizes, middle, marker="o", markersize=4, label=provider, color=colour)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        ticks = sorted({float(row.shape.partition("=")[2]) for row in swept})
        axes.set_xticks(ticks, [f"{tick:g}" if tick < 1e5 else f"{tick:.0e}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        # Where no power of ten is in sight, two of these are.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(variable)
        axes.set_ylabel("milliseconds")
        axes.set_title(f"{op} over {variable}, {dtype}, {mode}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        path = folder / f"{name}_{op}_{variable}_{dtype}_{mode.replace('+', '_')}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        paths.append(path)
    return paths
