"""PNGs and one self-contained HTML page of a run."""

from __future__ import annotations

import base64
import html
from pathlib import Path

import torch
from torch import Tensor

from . import figures
from .settings import Settings
from .stages import GRIDS, Bench
from .tables import bars_table, results_table, times_table

STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; color: #1f2933; max-width: 1080px; margin: 2.2rem auto; padding: 0 1.2rem; background: #fff }
h1 { font-size: 1.7rem; margin-bottom: .2rem }
h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #e4e7eb; padding-bottom: .3rem }
img { max-width: 100% }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th { text-align: left; color: #7b8794; font-weight: 600; border-bottom: 2px solid #e4e7eb; padding: .35rem .5rem }
td { border-bottom: 1px solid #eef1f4; padding: .3rem .5rem; vertical-align: top }
td.n, th.n { text-align: right; white-space: nowrap }
tr.group td { background: #f5f7fa; font-weight: 600 }
.ok { color: #1a7f5a; font-weight: 600 }
.bad { color: #c1121f; font-weight: 600 }
.note { color: #52606d; font-size: 13.5px }
.grids { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1.2rem }
figure { margin: 0 }
figcaption { font-size: 13px; color: #52606d; margin-bottom: .3rem }
figcaption b { color: #1f2933 }
figure img { width: 100%; image-rendering: pixelated }
"""


def _titles(bench: Bench) -> dict[str, str]:
    """Names of the sample grids, in the order they are shown."""
    settings = bench.settings
    few = min(settings.schedule_steps)
    titles = {
        "held_out": "Held-out images",
        "teacher": "Teacher (DSM)",
        "lcss": "Teacher (LCSS)",
        f"karras_{few}": f"Karras schedule, {few} steps",
        f"optimised_{few}": f"Optimised schedule, {few} steps",
    }
    for grid, reuse in settings.skip_trials:
        titles[f"full_{grid}"] = f"All {settings.skip_steps} steps, {GRIDS[grid]}"
        titles[f"adaptive_{grid}_{reuse}"] = f"AdaptiveSkip, {reuse}, {GRIDS[grid]}"
    return titles | {
        "sim": "SIM",
        **{f"moment_matching_{k}": f"Moment matching, k={k}" for k in sorted(settings.moment_matching_steps)},
    }


def _overview_names(settings: Settings) -> set[str]:
    """The twelve grids that one picture shows."""
    few, grid = min(settings.schedule_steps), settings.skip_trials[0][0]
    chosen = {"held_out", "teacher", "lcss", f"karras_{few}", f"optimised_{few}", f"full_{grid}", "sim"}
    return chosen | {f"adaptive_{grid}_{settings.skip_trials[0][1]}"} | {f"moment_matching_{k}" for k in settings.moment_matching_steps}


def _held_out_grid(bench: Bench) -> Tensor:
    """Held-out images of the classes that the sample grids show."""
    seen: dict[int, int] = {}
    chosen = []
    members = {label: (bench.judge.labels == label).nonzero().flatten() for label in range(bench.data.num_classes)}
    for label in bench.grid_labels().tolist():
        position = seen.get(label, 0)
        seen[label] = position + 1
        chosen.append(bench.judge.held_out_index[members[label][position % len(members[label])]])
    return bench.data.images[torch.stack(chosen)]


def _calls(row: dict) -> str:
    return f"{row['calls']} network call{'s' if row['calls'] != 1 else ''}"


def _subtitle(name: str, rows: dict[str, dict]) -> str:
    if name not in rows:
        return "real data the networks never saw"
    row = rows[name]
    quality = f"{row['psnr']:.1f} dB" if name.startswith("adaptive") else f"Fréchet {row['frechet']:.3f}"
    return f"{_calls(row)}, {quality}"


def write_figures(bench: Bench, metrics: dict, out: Path) -> dict[str, tuple[str, str]]:
    """Write every PNG; returns title and subtitle of each sample grid."""
    rows, settings = metrics["rows"], bench.settings
    grids = {"held_out": _held_out_grid(bench)} | {name: grid for stage in bench.results.values() for name, grid in stage.grids.items()}
    captions = {}
    for name, title in _titles(bench).items():
        figures.save_grid(bench.data, grids[name], settings.grid_rows, out / f"samples_{name}.png")
        captions[name] = (title, _subtitle(name, rows))
    panels = [(*captions[name], grids[name]) for name in captions if name in _overview_names(settings)]
    figures.overview(bench.data, panels, settings.grid_rows, out / "overview.png")
    schedule = bench.results["schedule"]
    figures.schedule_plot(schedule.details, rows, settings.schedule_steps, out / "schedule.png")
    figures.skip_timeline(bench.results["skipping"].details, rows, out / "skipping.png")
    curves = {name: stage.curves for name, stage in bench.results.items()}
    moments = {f"k={k}": curves[f"moment_matching_{k}"]["gap"] for k in sorted(settings.moment_matching_steps)}
    figures.loss_curves(
        (
            ("Teachers: loss", "DSM loss", {"DSM": curves["teacher"]["loss"]}),
            ("LCSS: loss (its zero is arbitrary)", "LCSS loss", {"LCSS": curves["lcss"]["loss"]}),
            ("SIM: |fake - teacher|²", "mean square", {"SIM": curves["sim"]["gap"]}),
            ("Moment matching: |auxiliary - teacher|²", "mean square", moments),
        ),
        out / "losses.png",
    )
    figures.calls_against_distance(rows, bench.judge.floor, out / "quality.png")
    return captions


def _embed(path: Path, alt: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _verdict(metrics: dict) -> str:
    missed, total = metrics["bars_missed"], len(metrics["bars"])
    if not missed:
        return f"<p class=ok>All {total} bars are met.</p>"
    return f"<p class=bad>{len(missed)} of {total} bars are missed: {html.escape('; '.join(missed))}.</p>"


def _grids(captions: dict[str, tuple[str, str]], out: Path) -> str:
    def one(name: str, title: str, subtitle: str) -> str:
        caption = f"<figcaption><b>{html.escape(title)}</b><br>{html.escape(subtitle)}</figcaption>"
        return f"<figure>{caption}{_embed(out / f'samples_{name}.png', title)}</figure>"

    return "<div class=grids>" + "".join(one(name, *texts) for name, texts in captions.items()) + "</div>"


def _sections(metrics: dict, captions: dict[str, tuple[str, str]], out: Path) -> list[tuple[str, str, str]]:
    """(heading, note, body) in order."""
    settings, held_out, schedule = metrics["settings"], metrics["held_out"], metrics["schedule"]
    accuracy, count = held_out["feature_extractor_held_out_accuracy"], held_out["samples_per_set"]
    judged = (
        f"Fréchet distance on {metrics['num_features']} features of a small classifier, trained on the training images alone "
        f"(held-out accuracy {accuracy:.3f}), against {count} held-out images. Every row is the mean over {settings['frechet_sets']} "
        f"sample sets ({settings['few_call_sets']} for the distilled samplers and the teacher at as few calls), each with the number of "
        "images and the labels of the held-out ones. The floor is the distance of that many training images. Times are of the whole "
        f"sampler in one CPU thread, per sample, in a batch of {count}."
    )
    skipping = (
        f"{settings['skip_steps']} {settings['skip_solver']} steps; PSNR is against the trajectory that computes every step. Beside each "
        "adaptive rule stand two baselines with exactly as many network calls: computed steps spread evenly, and plainly fewer steps. "
        "The SD grid has the noise levels of Stable Diffusion, the Karras grid those of Karras et al."
    )
    return [
        ("Samples", "The same initial noise and the same classes in every picture.", _grids(captions, out)),
        ("Quality for network calls", "", _embed(out / "quality.png", "Fréchet distance over network calls")),
        ("The table", judged, results_table(metrics)),
        (
            "Schedules",
            f"Levels between which the teacher's score changes equally much, estimated from its own scores in "
            f"{schedule['seconds_to_optimise']:.1f} s, beside the levels of Karras et al.",
            _embed(out / "schedule.png", "noise levels of both schedules"),
        ),
        (
            "Step skipping",
            skipping,
            _embed(out / "skipping.png", "which steps called the network"),
        ),
        ("Training", "", _embed(out / "losses.png", "loss curves")),
        ("Time", "", times_table(metrics)),
    ]


def write_report(bench: Bench, metrics: dict, out: Path) -> Path:
    """PNGs and ``report.html`` in `out`."""
    captions = write_figures(bench, metrics, out)
    data, environment, settings = metrics["data"], metrics["environment"], metrics["settings"]
    name = html.escape(data["name"])
    body = "".join(
        f"<h2>{heading}</h2>" + (f"<p class=note>{note}</p>" if note else "") + content
        for heading, note, content in _sections(metrics, captions, out)
    )
    page = f"""<!doctype html>
<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>fastdiff_kernels: demo on {name}</title><style>{STYLE}</style>
<h1>From a teacher to one step: {name}</h1>
<p class=note>{data["images"]} images of shape {"×".join(map(str, data["shape"]))}; settings “{settings["name"]}”, seed {settings["seed"]};
{metrics["total_s"] / 60:.1f} minutes in {metrics["workers"]} processes of one thread, torch {environment["torch"]}</p>
{_verdict(metrics)}
{bars_table(metrics)}
{body}
</html>
"""
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
