"""The tables of the report, as HTML."""

from __future__ import annotations

from html import escape

GROUPS = {
    "teacher": "Teachers",
    "schedule": "Schedules, Heun",
    "teacher, few calls": "The undistilled teacher with as many calls as the distilled samplers",
    "skipping": "Step skipping",
    "distilled": "Distilled",
}
OK, BAD = "<span class=ok>{}</span>", "<span class=bad>{}</span>"


def _line(text: str, *numbers: str, last: str = "", tag: str = "td") -> str:
    """A table row: a text, right-aligned numbers, a text."""
    cells = "".join(f"<{tag} class=n>{number}</{tag}>" for number in numbers)
    return f"<tr><{tag}>{text}</{tag}>{cells}<{tag}>{last}</{tag}></tr>"


def _group(title: str, columns: int) -> str:
    return f"<tr class=group><td colspan={columns}>{title}</td></tr>"


def _table(*lines: str) -> str:
    return "<table>" + "\n".join(lines) + "</table>"


def results_table(metrics: dict) -> str:
    """Floor and every row, grouped; a row that loses to a baseline at equal calls says so."""
    rows, held_out = metrics["rows"], metrics["held_out"]
    spread = f"{held_out['floor_over_splits_mean']:.4f} ± {held_out['floor_over_splits_std']:.4f}"
    lines = [
        _line("", "network calls", "ms per sample", "Fréchet distance", "PSNR, dB", last="at equal calls", tag="th"),
        _group("Floor", 6),
        _line(
            "Training images against held-out images",
            "0",
            "",
            f"{held_out['floor']:.4f}",
            "",
            last=f"over {len(metrics['floor_over_splits'])} other splits: {spread}",
        ),
    ]
    for group, title in GROUPS.items():
        lines.append(_group(title, 6))
        lines += [_result(row, rows) for row in rows.values() if row["method"] == group]
    return _table(*lines)


def _result(row: dict, rows: dict[str, dict]) -> str:
    def named(names: list[str]) -> str:
        return "; ".join(escape(rows[name]["label"]) for name in names)

    verdict = ""
    if row["loses_to"]:
        verdict = BAD.format("loses") + " to " + named(row["loses_to"])
    elif row["baselines"]:
        verdict = OK.format("better") + " than " + named(row["baselines"])
    spread = f" <span class=note>± {row['frechet_std']:.4f}</span>" if row["frechet_std"] else ""
    psnr = "" if "psnr" not in row else f"{row['psnr']:.1f}"
    return _line(
        escape(row["label"]), str(row["calls"]), f"{row['ms_per_sample']:.3f}", f"{row['frechet']:.4f}{spread}", psnr, last=verdict
    )


def bars_table(metrics: dict) -> str:
    """What was promised, what was measured."""
    lines = [_line("", "measured", "bar", last="result", tag="th")]
    for bar in metrics["bars"]:
        verdict = OK.format("met") if bar["passed"] else BAD.format("MISSED")
        if bar["stretch"] is not None:
            verdict += f", stretch {bar['stretch']:g} {'met' if bar['stretch_passed'] else 'not met'}"
        limit = f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:g}"
        lines.append(_line(escape(bar["name"]), f"{bar['value']:.3g}", limit, last=verdict))
    return _table(*lines)


def times_table(metrics: dict) -> str:
    """Seconds of each stage, measured and as predicted at the start."""
    lines = [_line("stage", "seconds", "predicted", tag="th")]
    for name, timing in metrics["stages"].items():
        predicted = f"{timing['predicted_s']:.0f}" if "predicted_s" in timing else ""
        note = " (from an earlier run)" if timing["resumed"] else ""
        lines.append(_line(name.replace("_", " ") + note, f"{timing['measured_s']:.1f}", predicted))
    return _table(*lines, _line(f"total, in {metrics['workers']} processes", f"{metrics['total_s']:.1f}", ""))
