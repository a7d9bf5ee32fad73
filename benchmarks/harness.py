"""Side-by-side measurement: every provider of a case is checked against the truth first, then all are timed turn by turn."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels import backend

from .ceilings import copy_bandwidth, matmul_rate
from .memory import peak_bytes
from .provenance import Provenance, device_name
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
    """Against the faster of torch.compile's modes that ran."""
    x_best_rival: float | None
    """Against the fastest of the providers that are neither eager, compile nor ours."""
    megabytes: float | None
    gb_per_s: float | None
    of_copy: float | None
    gigaflop: float | None
    tflop_per_s: float | None
    of_matmul: float | None
    launch_bound: bool
    peak_mb: float
    s_per_1000: float | None
    """Seconds for a thousand samples, where samples are drawn."""
    timed: str
    clock_mhz: float | None


@dataclass(frozen=True)
class Measured:
    """What was run, by provider, and each one's speed-up over eager."""

    runs: dict[str, Callable[[], tuple[Tensor, ...]]]
    speedups: dict[str, float]


FIELDS = (*(f.name for f in fields(Provenance)), *(f.name for f in fields(Row)))
# What libraries raise for a call that they do not take.
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError)  # the provider is left out, named with the reason


@dataclass(frozen=True)
class Check:
    """One case's inputs, and how far from the truth a provider's results may be."""

    case: Case
    args: list[Any]
    upstream: list[Tensor]
    """The gradients of the outputs."""
    exact: tuple[Tensor, ...]
    allowed: list[float]
    """Eager's own errors."""

    @classmethod
    def of(cls, case: Case, device: str) -> Check:
        """With inputs drawn, and the truth in float64 of these as rounded to the case's dtype."""
        w = case.workload
        args = case.inputs(case.dtype, device)
        wide = case.inputs(torch.float64, device, [a.detach() if isinstance(a, Tensor) else a for a in args])
        with torch.no_grad():
            outputs = Case(w, torch.float64, "forward").bind(w.checkable or w.eager, wide, [])()
        upstream = [torch.randn_like(o).to(case.dtype if o.dim() else torch.float32) for o in outputs]
        exact = case.bind(w.checkable or w.eager, wide, [u.double() for u in upstream])()
        return cls(case, args, upstream, exact, _errors(case.bind(w.checkable or w.eager, args, upstream)(), exact))

    def bind(self, provider: Callable) -> Callable[[], tuple[Tensor, ...]]:
        """provider at these inputs, as a call without arguments."""
        return self.case.bind(provider, self.args, self.upstream)

    def wrong(self, run: Callable[[], Sequence[Tensor]]) -> str | None:
        """Which result of run() is too far from the truth, in words."""
        return _excess(_errors(run(), self.exact), self.allowed, self.exact, self.case.workload.factor, self.case.dtype)


@dataclass
class Session:
    """The rows of one run."""

    device: str
    seconds: float
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What was wrong with providers of others, which get no row for it."""
    saved: int = 0
    """How many of the rows have been saved."""

    def measure(self, case: Case, providers: Mapping[str, Callable], backends: Sequence[str] = ()) -> Measured:
        """Adds a row for each provider, "eager" among them, for the workload's variants, and for "ours" on each of these backends alone.

        One of ours whose error is more than the workload's factor times eager's raises WrongResult before anything is timed; one of
        others, and one that refuses the case, is left out.
        """
        check = Check.of(case, self.device)
        runs = {name: check.bind(fn) for name, fn in providers.items()}
        runs |= {f"ours-{name}": _on_backend(name, runs["ours"]) for name in backends}
        for name, reason in _wrong(check, runs).items():
            self.left_out.append(f"{case}: {name}: {reason}")
            del runs[name]
        runs |= self._variants(case, check)
        times = interleave(runs, self.seconds, self.device, case.workload.captured)
        moved = case.bytes(check.args, runs["eager"]()) if case.workload.streams else None
        for name, run in runs.items():
            self.rows.append(self._row(case, name, times, moved, case.flops(check.args), peak_bytes(run, self.device)))
        return Measured(runs, {name: _cost(case, "eager", times) / _cost(case, name, times) for name in times})

    def _variants(self, case: Case, check: Check) -> dict[str, Callable]:
        """The workload's variants, after each has been held to its own definition."""
        wide = case.inputs(torch.float64, self.device, check.args)
        runs = {}
        for name, variant in case.workload.variants.items():
            exact, eager = (case.bind(variant.definition, given, [])() for given in (wide, check.args))
            own = Check(case, check.args, [], exact, _errors(eager, exact))
            runs[name] = own.bind(variant.run)
            if reason := own.wrong(runs[name]):
                raise WrongResult(f"{case}: {name}: {reason}")
        return runs

    def _row(self, case: Case, name: str, times: Mapping[str, Times], moved: int | None, operations: int | None, peak: int) -> Row:
        t, w = times[name], case.workload
        cost = _cost(case, name, times)
        compiled = [_cost(case, other, times) for other in times if other.startswith("compile")]
        rivals = [_cost(case, other, times) for other in times if not other.startswith(("eager", "compile", "ours"))]
        # A variant does less than the workload's own operations, by its nature.
        rate = None if operations is None or name in w.variants else operations / t.median
        through = None if moved is None else moved / t.median
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
            x_eager=_cost(case, "eager", times) / cost,
            x_compile=min(compiled) / cost if compiled else None,
            x_best_rival=min(rivals) / cost if rivals else None,
            megabytes=None if moved is None else moved / 1e6,
            gb_per_s=None if through is None else through / 1e9,
            of_copy=None if through is None else through / copy_bandwidth(self.device),
            gigaflop=None if rate is None else operations / 1e9,
            tflop_per_s=None if rate is None else rate / 1e12,
            of_matmul=None if rate is None else rate / matmul_rate(self.device, case.dtype),
            launch_bound=t.launch_bound,
            peak_mb=peak / 1e6,
            s_per_1000=cost if w.per_thousand else None,
            timed=t.how,
            clock_mhz=t.clock_mhz,
        )

    def table(self) -> list[str]:
        """The rows as text, one case after another."""
        lines = [
            f"{'op':30} {'network':12} {'shape':>18} {'dtype':8} {'mode':8} {'provider':14} {'p50 ms':>9} {'x eager':>8} {'x comp.':>8}"
            f" {'x rival':>8} {'% copy':>7} {'% mm':>6} {'peak MB':>8} {'s / 1000':>8}"
        ]
        for r in self.rows:
            of_copy, of_matmul = (None if part is None else 100 * part for part in (r.of_copy, r.of_matmul))
            lines.append(
                f"{r.op:30} {r.network:12} {r.shape:>18} {r.dtype:8} {r.mode:8} {r.provider:14} {r.p50_ms:9.3f} {r.x_eager:8.2f}"
                f" {_or_dash(r.x_compile, 8, 2)} {_or_dash(r.x_best_rival, 8, 2)} {_or_dash(of_copy, 7, 1)} {_or_dash(of_matmul, 6, 1)}"
                f" {r.peak_mb:8.2f} {_or_dash(r.s_per_1000, 8, 1)}{' launch-bound' if r.launch_bound else ''}"
            )
        return lines

    def save(self, path: Path) -> None:
        """Appends the rows that have not been saved, with their provenance, to a CSV file.

        Columns that it lacks are added to it, empty in earlier rows.
        """
        columns = _columns(path)
        rows, self.saved = self.rows[self.saved :], len(self.rows)
        where = asdict(Provenance.here(self.device))
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            for row in rows:
                writer.writerow({**where, **{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}})


def measured(path: Path, device: str) -> set[str]:
    """The cases, in words, that a results file has rows of ours for, measured on this device."""
    if not path.exists():
        return set()
    here = device_name(device)
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["device"] == here and row["provider"] == "ours"]
    return {" ".join(row[name] for name in ("op", "network", "shape", "dtype", "mode")) for row in rows}


def _columns(path: Path) -> list[str]:
    """The columns of a results file, after those that it lacks have been added."""
    earlier: list[dict[str, str]] = []
    columns: list[str] = []
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns, earlier = list(reader.fieldnames or ()), list(reader)
    if new := [name for name in FIELDS if name not in columns]:
        columns += new
        fresh = path.with_name(f"{path.name}.new")
        with fresh.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(earlier)
        fresh.replace(path)
    return columns


def _cost(case: Case, name: str, times: Mapping[str, Times]) -> float:
    """Seconds of one call, or for a thousand samples where the workload draws such."""
    w = case.workload
    per_thousand = w.variants[name].per_thousand if name in w.variants else w.per_thousand
    return times[name].median * (1 if per_thousand is None else per_thousand())


def _on_backend(name: str, run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    def call() -> tuple[Tensor, ...]:
        with backend(name):
            return run()

    return call


def _wrong(check: Check, runs: Mapping[str, Callable]) -> dict[str, str]:
    """Why providers of others, and of ours those on a backend that has no kernel, get no row; anything else wrong with ours raises."""
    found = {}
    for name, run in runs.items():
        if check.case.workload.checkable is not None and name in ("eager", "compile", "compile-max"):
            continue
        try:
            reason = check.wrong(run)
        except REFUSALS as error:
            if name.startswith(("eager", "ours")) and not str(error).startswith("backend("):
                raise
            found[name] = f"does not run: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            continue
        if reason and name.startswith("ours"):
            raise WrongResult(f"{check.case}: {name}: {reason}")
        if reason:
            found[name] = reason
    return found


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
