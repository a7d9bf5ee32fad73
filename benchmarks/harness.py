"""Side-by-side measurement: every provider of a case is checked against the truth first, then all are timed turn by turn."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ceilings import copy_bandwidth, matmul_rate
from .memory import peak_bytes
from .provenance import Provenance
from .timing import Times, interleave
from .workloads import Case

RESULTS = Path(__file__).parent / "results"


class WrongResult(AssertionError):
    """One of our kernels failed its check; its time would mean nothing."""


@dataclass(frozen=True)
class Row:
    """One provider of one case. Fractions are of ceilings measured in the same run; a bound that does not apply is empty."""

    op: str
    network: str
    shape: str
    dtype: str
    mode: str
    provider: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    x_eager: float
    x_compile: float | None
    x_best_rival: float | None
    """Against the fastest of the providers that are neither eager, compile nor ours."""
    gb_per_s: float
    of_copy: float
    tflop_per_s: float | None
    of_matmul: float | None
    launch_bound: bool
    peak_mb: float


@dataclass(frozen=True)
class Measured:
    """What was run, by provider, and each one's speed-up over eager."""

    runs: dict[str, Callable[[], tuple[Tensor, ...]]]
    speedups: dict[str, float]


FIELDS = (*(f.name for f in fields(Provenance)), *(f.name for f in fields(Row)))


@dataclass
class Session:
    """The rows of one run."""

    device: str
    seconds: float
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What was wrong with providers of others, which get no row for it."""

    def measure(self, case: Case, providers: Mapping[str, Callable]) -> Measured:
        """Adds a row for each provider, "eager" among them.

        One of ours whose error is more than the workload's factor times eager's raises WrongResult before anything is timed; one of
        others is left out.
        """
        drawn = case.workload.inputs()
        args = case.inputs(case.dtype, self.device, drawn)
        exact, upstream = self._truth(case, drawn)
        runs = {name: case.bind(fn, args, [u.to(case.dtype if u.shape else u.dtype) for u in upstream]) for name, fn in providers.items()}
        for name, wrong in self._wrong(case, runs, args, upstream, exact).items():
            if name.startswith("ours"):
                raise WrongResult(wrong)
            self.left_out.append(wrong)
            del runs[name]
        times = interleave(runs, self.seconds, self.device)
        moved = case.bytes(args, runs["eager"]())
        for name, run in runs.items():
            self.rows.append(self._row(case, name, times, moved, case.flops(args), peak_bytes(run, self.device)))
        return Measured(runs, {name: times["eager"].median / t.median for name, t in times.items()})

    def _truth(self, case: Case, drawn: Sequence[Any]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The results in float64 of the inputs as rounded to the case's dtype, and the outputs' gradients that went into them."""
        w = case.workload
        rounded = case.inputs(case.dtype, self.device, drawn)
        wide = case.inputs(torch.float64, self.device, [a.detach() if isinstance(a, Tensor) else a for a in rounded])
        with torch.no_grad():
            outputs = Case(w, torch.float64, "forward").bind(w.checkable or w.eager, wide, [])()
        upstream = [torch.randn_like(o).to(case.dtype if o.dim() > 1 else torch.float32) for o in outputs]
        return case.bind(w.checkable or w.eager, wide, [u.double() for u in upstream])(), upstream

    def _wrong(
        self, case: Case, runs: Mapping[str, Callable], args: Sequence[Any], upstream: Sequence[Tensor], exact: Sequence[Tensor]
    ) -> dict[str, str]:
        """What is wrong with each provider that is too far from the truth."""
        w = case.workload
        standard = runs["eager"] if w.checkable is None else case.bind(w.checkable, args, upstream)
        allowed = _errors(standard(), exact)
        drawing = () if w.checkable is None else ("eager", "compile", "compile-max")
        found = {
            name: _excess(_errors(run(), exact), allowed, exact, w.factor, case.dtype) for name, run in runs.items() if name not in drawing
        }
        return {name: f"{case}: {name}: {excess}" for name, excess in found.items() if excess}

    def _row(self, case: Case, name: str, times: Mapping[str, Times], moved: int, operations: int | None, peak: int) -> Row:
        t, w = times[name], case.workload
        rivals = [other.median for rival, other in times.items() if not rival.startswith(("eager", "compile", "ours"))]
        rate = None if operations is None else operations / t.median
        return Row(
            op=w.op,
            network=w.network,
            shape=w.shape if isinstance(w.shape, str) else "x".join(map(str, w.shape)),
            dtype=str(case.dtype).removeprefix("torch."),
            mode=case.mode,
            provider=name,
            p20_ms=1e3 * t.quantile(0.2),
            p50_ms=1e3 * t.median,
            p80_ms=1e3 * t.quantile(0.8),
            x_eager=times["eager"].median / t.median,
            x_compile=times["compile"].median / t.median if "compile" in times else None,
            x_best_rival=min(rivals) / t.median if rivals else None,
            gb_per_s=moved / t.median / 1e9,
            of_copy=moved / t.median / copy_bandwidth(self.device),
            tflop_per_s=None if rate is None else rate / 1e12,
            of_matmul=None if rate is None else rate / matmul_rate(self.device, case.dtype),
            launch_bound=t.launch_bound,
            peak_mb=peak / 1e6,
        )

    def table(self) -> list[str]:
        """The rows as text, one case after another."""
        lines = [
            f"{'op':30} {'network':12} {'shape':>18} {'dtype':8} {'mode':8} {'provider':14} {'p50 ms':>9} {'x eager':>8} {'x comp.':>8}"
            f" {'% copy':>7} {'% mm':>6} {'peak MB':>8}"
        ]
        for r in self.rows:
            of_matmul = None if r.of_matmul is None else 100 * r.of_matmul
            lines.append(
                f"{r.op:30} {r.network:12} {r.shape:>18} {r.dtype:8} {r.mode:8} {r.provider:14} {r.p50_ms:9.3f} {r.x_eager:8.2f}"
                f" {_or_dash(r.x_compile, 8, 2)} {100 * r.of_copy:7.1f} {_or_dash(of_matmul, 6, 1)} {r.peak_mb:8.2f}"
            )
        return lines

    def save(self, path: Path) -> None:
        """Appends the rows, with their provenance, to a CSV file."""
        fresh = not path.exists()
        where = astuple(Provenance.here(self.device))
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(FIELDS)
            for row in self.rows:
                writer.writerow((*where, *(f"{v:.4g}" if isinstance(v, float) else v for v in astuple(row))))


def _or_dash(value: float | None, width: int, digits: int) -> str:
    return f"{value:{width}.{digits}f}" if value is not None else f"{'-':>{width}}"


def _errors(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [(o.detach().double() - t).abs().max().item() if t.numel() else 0.0 for o, t in zip(outputs, exact, strict=True)]


def _excess(errors: list[float], allowed: list[float], exact: Sequence[Tensor], factor: float, dtype: torch.dtype) -> str | None:
    """The first result that is too far from the truth, in words."""
    for i, (error, eager, t) in enumerate(zip(errors, allowed, exact, strict=True)):
        rounding = torch.finfo(dtype).eps * t.abs().max().item() if t.numel() else 0.0
        if not error <= max(factor * eager, rounding):
            return f"output {i} is {error:.3e} from the truth; eager {eager:.3e}, one rounding {rounding:.3e}"
    return None
