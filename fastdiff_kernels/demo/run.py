"""`fastdiff demo`: data in, teacher, schedule, skipping, distillation, report out."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from . import stages
from .bars import Bar, compute_bars, mark_losses
from .data import ImageData, load_digits, load_folder
from .features import NUM_FEATURES
from .judge import Judge
from .plan import predict
from .report import write_report
from .settings import Settings
from .stages import Bench, Stage
from .store import Store, write_json

StageFunction = Callable[[Bench], Stage]


def load_data(folder: str | Path | None, size: int) -> ImageData:
    """The digits, or the folder's images."""
    return load_digits() if folder is None else load_folder(folder, size)


def stage_functions(settings: Settings) -> dict[str, StageFunction]:
    """Stages by name, in the order they run."""
    functions: dict[str, StageFunction] = {
        "teacher": stages.train_teacher,
        "lcss": stages.train_lcss,
        "schedule": stages.optimise_schedule,
        "skipping": stages.skip_steps,
        "sim": stages.distil_sim,
    }
    for steps in settings.moment_matching_steps:
        functions[f"moment_matching_{steps}"] = partial(stages.distil_moment_matching, steps=steps)
    return functions


def run_demo(
    settings: Settings,
    out: str | Path,
    *,
    data: ImageData | None = None,
    resume: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict:
    """Run every stage that is not finished yet and write the report.

    Args:
        settings: what to compute.
        out: folder for ``report.html``, ``metrics.json``, PNGs and ``networks/``; made if need be.
        data: images; the digits unless given.
        resume: keep the finished stages and checkpoints that an interrupted run with the same settings and data left in `out`.
        progress: show progress bars.
        say: called with each line of the summary.

    Returns:
        What ``metrics.json`` holds.
    """
    data = load_digits() if data is None else data
    out = Path(out)
    start = time.perf_counter()
    store = Store(out, settings.fingerprint(data))
    if not resume:
        store.forget()
    judge = Judge(
        data, seed=settings.seed, feature_epochs=settings.feature_epochs, sets=settings.frechet_sets, floor_splits=settings.floor_splits
    )
    store.save_network("features", judge.extractor)
    bench = Bench(settings, data, judge, store.checkpoints, progress)
    timings = {"features": {"measured_s": time.perf_counter() - start, "resumed": False}}
    functions = stage_functions(settings)
    predicted = predict(settings, data, len(judge.labels))
    counts = f"{len(judge.images)} training and {len(judge.labels)} held-out images"
    say(f"{data.name}: {counts}; about {sum(predicted.values()) / 60:.1f} minutes")
    for number, (name, function) in enumerate(functions.items(), 1):
        say(f"[{number}/{len(functions)}] {name.replace('_', ' ')}")
        timings[name] = _run_stage(bench, store, name, function) | {"predicted_s": predicted[name]}
    metrics = _metrics(bench, timings)
    write_report(bench, metrics, out)
    metrics["total_s"] = sum(t["measured_s"] for t in timings.values())
    write_json(out / "metrics.json", metrics)
    for line in summary(metrics):
        say(line)
    say(f"report: {out / 'report.html'}")
    return metrics


def _run_stage(bench: Bench, store: Store, name: str, function: StageFunction) -> dict[str, object]:
    finished = store.load(name, bench.settings, bench.data)
    if finished is None:
        start = time.perf_counter()
        stage = function(bench)
        seconds = time.perf_counter() - start
        store.save(name, stage, seconds)
    else:
        stage, seconds = finished
    bench.results[name] = stage
    bench.networks.update(stage.networks)
    return {"measured_s": seconds, "resumed": finished is not None}


def _metrics(bench: Bench, timings: dict[str, dict]) -> dict:
    rows = {name: dict(row) for stage in bench.results.values() for name, row in stage.rows.items()}
    mark_losses(rows)
    settings = bench.settings
    bars = compute_bars(rows, bench.judge.floor, settings.schedule_steps, settings.moment_matching_steps)
    return {
        "data": {"name": bench.data.name, "images": len(bench.data.images), "shape": list(bench.data.sample_shape)},
        "settings": dataclasses.asdict(settings),
        "environment": {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "held_out": bench.judge.summary(),
        "num_features": NUM_FEATURES,
        "floor_over_splits": bench.judge.floor_over_splits,
        "rows": rows,
        "bars": [bar.as_dict() for bar in bars],
        "bars_missed": [bar.name for bar in bars if not bar.passed],
        "schedule": {k: v for k, v in bench.results["schedule"].details.items() if k not in ("knots", "cost")},
        "skipping": bench.results["skipping"].details,
        "stages": timings,
        "total_s": sum(t["measured_s"] for t in timings.values()),
    }


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
