"""Tables and pages made of measured rows: nothing in them is typed by hand."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from .figures import cost_figures, speedup_figures
from .rows import Row, by_case, latest

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SWEEP = "sweep"
_HEAD = (
    "op", "network", "shape", "dtype", "mode", "ms",
    "of eager", "of `torch.compile`", "of the best other", "% of copy", "peak MB of eager's",
)  # fmt: skip


def _cells(providers: dict[str, Row]) -> tuple[str, ...]:
    ours, eager = providers["ours"], providers["eager"]

    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}{' (loses)' if value < 1 else ''}"

    return (
        ours.op,
        ours.network,
        ours.shape,
        ours.dtype,
        ours.mode,
        f"{ours.p50_ms:.3g}",
        times(ours.x_eager),
        times(ours.x_compile),
        times(ours.x_best_rival),
        "" if ours.of_copy is None else f"{100 * ours.of_copy:.0f}",
        "" if ours.peak_mb is None or not eager.peak_mb else f"{ours.peak_mb:.1f} / {eager.peak_mb:.1f}",
    )


def _cases(rows: Iterable[Row]) -> list[dict[str, Row]]:
    return [providers for providers in by_case(rows).values() if {"ours", "eager"} <= providers.keys()]


def _machines(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.device for row in rows))


def _caption(rows: Sequence[Row]) -> str:
    first, last = min(row.date for row in rows)[:10], max(row.date for row in rows)[:10]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    when = first if first == last else f"{first} to {last}"
    return f"{rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}, {when}, commit {commits}"


def markdown(rows: Iterable[Row], networks: Sequence[str] = ()) -> str:
    """Tables of how many times faster ours is, one for each machine; sweeps are left to the figures."""
    kept = [row for row in latest(rows) if row.network != SWEEP and (not networks or row.network in networks)]
    blocks = []
    for machine in _machines(kept):
        here = [row for row in kept if row.device == machine]
        lines = [f"{_caption(here)}:", "", f"| {' | '.join(_HEAD)} |", f"|{' --- |' * len(_HEAD)}"]
        lines += [f"| {' | '.join(_cells(providers))} |" for providers in _cases(here)]
        blocks.append("\n".join(lines))
    if not any("NVIDIA" in row.device for row in kept):
        blocks.append("GPU: not measured.")
    return "\n\n".join(blocks)


def splice(text: str, block: str) -> str:
    """text with what stands between the two marks replaced.

    Raises:
        ValueError: the marks are not there, each once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the text must have {BEGIN} and, after it, {END}, each once")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{block}\n{text[text.index(END) :]}"


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-size:13px}td,th{padding:.25em .6em;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}td.loses{color:#b00020}img{max-width:100%}"""


def _html_table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{html.escape(name.replace('`', ''))}</th>" for name in _HEAD)
    body = []
    for providers in _cases(rows):
        cells = "".join(
            f'<td class="n{" loses" if "(loses)" in cell else ""}">{html.escape(cell)}</td>' if i > 4 else f"<td>{html.escape(cell)}</td>"
            for i, cell in enumerate(_cells(providers))
        )
        body.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{path.stem}" src="data:image/png;base64,{data}"></p>'


def _page(body: str) -> str:
    title = "fastdiff_kernels, measured"
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><h1>{title}</h1>{body}</body></html>'


def write(rows: Iterable[Row], folder: str | Path) -> Path:
    """report.html and report.md, with their figures, in a folder; returns the page."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = latest(rows)
    parts = []
    for machine in _machines(kept):
        here = [row for row in kept if row.device == machine]
        name = "".join(c if c.isalnum() else "_" for c in machine)
        cases = [row for row in here if row.network != SWEEP]
        parts.append(f"<h2>{html.escape(_caption(here))}</h2>")
        figures = speedup_figures(_cases(cases), folder, name) if cases else []
        figures += cost_figures([row for row in here if row.network == SWEEP], folder, name)
        parts += [_picture(path) for path in figures]
        parts.append(_html_table(cases))
    if not any("NVIDIA" in row.device for row in kept):
        parts.append("<p>GPU: not measured.</p>")
    page = folder / "report.html"
    page.write_text(_page("\n".join(parts)))
    (folder / "report.md").write_text(markdown(kept) + "\n")
    return page
