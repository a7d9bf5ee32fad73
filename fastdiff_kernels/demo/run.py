"""`fastdiff demo`: data in, teacher, schedule, skipping, distillation, report out."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .bars import Bar, compute_bars, mark_losses
from .data import ImageData, load_digits, load_folder
from .features import NUM_FEATURES
from .plan import predict
from .report import write_report
from .settings import Settings
from .stages import Bench
from .store import Store, write_json
from .workers import new_judge, one_thread, run_stages, stage_functions


def load_data(folder: str | Path | None, size: int | None) -> ImageData:
    """The digits, or the folder's images at `size`, 16 unless given; ValueError for a size of the digits."""
    if folder is not None:
        return load_folder(folder, 16 if size is None else size)
    if size is not None:
        raise ValueError(f"size belongs to a folder of images and must not be given without data, got {size}")
    return load_digits()


def run_demo(
    settings: Settings,
    out: str | Path,
    *,
    data: ImageData | None = None,
    resume: bool = False,
    workers: int = 1,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict:
    """Run every stage that is not finished yet and write the report.

    Args:
        settings: what to compute.
        out: folder for ``report.html``, ``metrics.json``, PNGs and ``networks/``: one that is not there yet, an empty one, or that of an
            earlier demo, whose results are replaced.
        data: images; the digits unless given.
        resume: keep the finished stages and checkpoints that an interrupted run with the same settings and data left in `out`.
        workers: processes that stages run in side by side, one thread each. A stage of a small network fills one core and gains little
            from a second; two stages fill two. With 1 the stages run in this process.
        progress: show a progress bar.
        say: called with each line of the summary.

    Returns:
        What ``metrics.json`` holds. A PSNR is None where the samples are those they are compared with.

    Raises:
        FileExistsError: `out` holds files and no demo has written there before.
        ValueError: fewer workers than one.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    data = load_digits() if data is None else data
    out = Path(out)
    start = time.perf_counter()
    store = Store(out, settings.fingerprint(data))
    if not resume:
        store.forget(stage_functions(settings))
    with one_thread():
        judge = new_judge(settings, data, store)
        predicted = predict(settings, data, len(judge.labels))
        timings = {"features": {"measured_s": time.perf_counter() - start, "resumed": False}}
        counts = f"{len(judge.images)} training and {len(judge.labels)} held-out images"
        say(f"{data.name}: {counts}; about {sum(predicted.values()) / workers / 60:.1f} minutes")
        timings |= run_stages(settings, data, store, judge, predicted, workers=workers, progress=progress)
    results = {name: store.load(name) for name in predicted}
    bench = Bench(settings, data, judge, store.checkpoints, report=lambda stage, share: None, results=results)
    metrics = _metrics(bench, timings) | {"workers": workers, "total_s": time.perf_counter() - start}
    write_report(bench, metrics, out)
    written = _without_infinity(metrics)
    write_json(out / "metrics.json", written)
    for line in summary(metrics):
        say(line)
    say(f"report: {out / 'report.html'}")
    return written


def _metrics(bench: Bench, timings: dict[str, dict]) -> dict:
    rows = {name: dict(row) for stage in bench.results.values() for name, row in stage.rows.items()}
    mark_losses(rows)
    settings = bench.settings
    bars = compute_bars(rows, bench.judge.floor, settings.schedule_steps, settings.moment_matching_steps)
    return {
        "data": {"name": bench.data.name, "images": len(bench.data.images), "shape": list(bench.data.sample_shape)},
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "environment": {"python": platform.python_version(), "torch": torch.__version__},
        "held_out": bench.judge.summary(),
        "num_features": NUM_FEATURES,
        "floor_over_splits": bench.judge.floor_over_splits,
        "rows": rows,
        "bars": [bar.as_dict() for bar in bars],
        "bars_missed": [bar.name for bar in bars if not bar.passed],
        "schedule": {k: v for k, v in bench.results["schedule"].details.items() if k not in ("knots", "cost")},
        "skipping": bench.results["skipping"].details,
        "stages": timings,
    }


def _without_infinity(metrics: dict) -> dict:
    """JSON has no infinity, which the PSNR of equal samples is; any other number that is not finite is a fault, and stays."""
    rows = {name: row | {"psnr": None} if row.get("psnr") == math.inf else row for name, row in metrics["rows"].items()}
    bars = [bar | {"value": None} if "PSNR" in bar["name"] and bar["value"] == math.inf else bar for bar in metrics["bars"]]
    return metrics | {"rows": rows, "bars": bars}


def summary(metrics: dict) -> list[str]:
    """The terminal's last words: bars, losing rows, time."""
    lines = [_bar_line(Bar(b["name"], b["value"], b["limit"], b["at_most"], b["stretch"])) for b in metrics["bars"]]
    for row in metrics["rows"].values():
        for baseline in row["loses_to"]:
            lines.append(f"loses at {row['calls']} calls: {row['label']}, to {metrics['rows'][baseline]['label']}")
    missed = metrics["bars_missed"]
    kept = len(metrics["bars"]) - len(missed)
    lines.append(f"{kept} of {len(metrics['bars'])} bars met in {metrics['total_s'] / 60:.1f} minutes")
    return lines + ([f"MISSED: {', '.join(missed)}"] if missed else [])


def _bar_line(bar: Bar) -> str:
    sign = "<=" if bar.at_most else ">="
    verdict = "ok    " if bar.passed else "MISSED"
    stretch = "" if bar.stretch is None else f" (stretch {bar.stretch:g}: {'met' if bar.stretched else 'not met'})"
    return f"{verdict} {bar.name}: {bar.value:.3g} {sign} {bar.limit:g}{stretch}"
