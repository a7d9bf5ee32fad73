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
_MORE = ("p20 to p80 ms", "GB/s", "TFLOP/s", "% of matmul", "bound by launches")
_SAMPLING_HEAD = ("network", "shape", "dtype", "by", "s for 1,000 samples", "times as fast as eager")
_SAMPLING_NOTE = (
    "Whole trajectories. Where the shape names a part of the steps or layers, the seconds are those of that part times what was left out. "
    "Weights are random: what fewer steps cost in quality is not measured here."
)


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


def _more_cells(ours: Row) -> tuple[str, ...]:
    return (
        f"{ours.p20_ms:.3g} to {ours.p80_ms:.3g}",
        _number(ours.gb_per_s),
        _number(ours.tflop_per_s),
        "" if ours.of_matmul is None else f"{100 * ours.of_matmul:.0f}",
        "yes" if ours.launch_bound else "",
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _sampling_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Every way to a thousand samples, eager first."""
    return [
        (r.network, r.shape, r.dtype, r.provider, _seconds(r.s_per_1000), f"{r.x_eager:.2f}{' (loses)' if r.x_eager < 1 else ''}")
        for r in rows
        if r.s_per_1000 is not None
    ]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cases(rows: Iterable[Row]) -> list[dict[str, Row]]:
    return [providers for providers in by_case(rows).values() if {"ours", "eager"} <= providers.keys()]


def _machines(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.device for row in rows))


def _caption(rows: Sequence[Row]) -> str:
    first, last = min(row.date for row in rows)[:10], max(row.date for row in rows)[:10]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    when = first if first == last else f"{first} to {last}"
    clocks = [row.clock_mhz for row in rows if row.clock_mhz is not None]
    range_of_clocks = dict.fromkeys(f"{clock:.0f}" for clock in (min(clocks), max(clocks))) if clocks else {}
    clock = f", {' to '.join(range_of_clocks)} MHz" if clocks else ""
    return f"{rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}, {when}, commit {commits}{clock}"


def _absent(rows: Sequence[Row]) -> str:
    """What no row is compared with."""
    names = set.intersection(*(set(row.absent.split()) for row in rows))
    return f"Not installed, so not compared with: {', '.join(sorted(names))}." if names else ""


def _is_one_of(network: str, chosen: Sequence[str]) -> bool:
    """Whether it is one of these, or a part or a variant of one: "EDM-16" and "EDM NHWC" of "EDM", but not "EDM2"."""
    return any(network == name or network.startswith((f"{name} ", f"{name}-")) for name in chosen)


def markdown(rows: Iterable[Row], networks: Sequence[str] = ()) -> str:
    """Tables of how many times faster ours is, one for each machine; sweeps are left to the figures.

    Raises:
        ValueError: no row is of one of `networks`, of its parts or of its variants.
    """
    measured = [row for row in latest(rows) if row.network != SWEEP]
    known = dict.fromkeys(row.network for row in measured)
    if unknown := [name for name in networks if not any(_is_one_of(network, [name]) for network in known)]:
        raise ValueError(f"network must be one of {', '.join(map(repr, known))}; got {', '.join(map(repr, unknown))}")
    kept = [row for row in measured if not networks or _is_one_of(row.network, networks)]
    blocks = []
    for machine in _machines(kept):
        here = [row for row in kept if row.device == machine]
        lines = [f"{_caption(here)}:", "", f"| {' | '.join(_HEAD)} |", f"|{' --- |' * len(_HEAD)}"]
        lines += [f"| {' | '.join(_cells(providers))} |" for providers in _cases(row for row in here if row.s_per_1000 is None)]
        if sampled := _sampling_cells(here):
            lines += ["", _SAMPLING_NOTE, "", f"| {' | '.join(_SAMPLING_HEAD)} |", f"|{' --- |' * len(_SAMPLING_HEAD)}"]
            lines += [f"| {' | '.join(cells)} |" for cells in sampled]
        if absent := _absent(here):
            lines += ["", absent]
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


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:2em auto;padding:0 1em;color:#222}
h2{font-size:1.1em}h3{font-size:1em;margin-top:2em}.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:13px}td,th{padding:.25em .6em;border-bottom:1px solid #ddd;text-align:left}
td{white-space:nowrap}td.n{text-align:right;font-variant-numeric:tabular-nums}td.loses{color:#b00020}
.wide img{max-width:100%;min-width:640px}
.side{display:flex;flex-wrap:wrap;gap:1em}.side img{flex:1 1 360px;min-width:0;max-width:560px}"""


def _html_table(head: Sequence[str], body: Sequence[Sequence[str]], words: int) -> str:
    """A table of which the first columns hold words and the others numbers."""
    titles = "".join(f"<th>{html.escape(name.replace('`', ''))}</th>" for name in head)
    lines = []
    for cells in body:
        line = "".join(
            f'<td class="n{" loses" if "(loses)" in cell else ""}">{html.escape(cell)}</td>'
            if i >= words
            else f"<td>{html.escape(cell)}</td>"
            for i, cell in enumerate(cells)
        )
        lines.append(f"<tr>{line}</tr>")
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{data}">'


def _page(body: str) -> str:
    title = "fastdiff_kernels, measured"
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{title}</title><style>{_STYLE}</style>'
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
        measured = [row for row in here if row.network != SWEEP]
        cases = _cases(row for row in measured if row.s_per_1000 is None)
        parts.append(f"<h2>{html.escape(_caption(here))}</h2>")
        if absent := _absent(here):
            parts.append(f"<p>{html.escape(absent)}</p>")
        if sampled := _sampling_cells(measured):
            parts += ["<h3>Samples, end to end</h3>", f"<p>{_SAMPLING_NOTE}</p>", _html_table(_SAMPLING_HEAD, sampled, 4)]
        parts.append("<h3>Ops, blocks and steps</h3>")
        parts += [f'<p class="wide">{_picture(path)}</p>' for path in speedup_figures(cases, folder, name)]
        swept = cost_figures([row for row in here if row.network == SWEEP], folder, name)
        parts.append(f'<div class="side">{"".join(map(_picture, swept))}</div>')
        parts.append(_html_table((*_HEAD, *_MORE), [(*_cells(case), *_more_cells(case["ours"])) for case in cases], 5))
    if not any("NVIDIA" in row.device for row in kept):
        parts.append("<p>GPU: not measured.</p>")
    page = folder / "report.html"
    page.write_text(_page("\n".join(parts)))
    (folder / "report.md").write_text(markdown(kept) + "\n")
    return page
