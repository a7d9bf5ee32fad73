"""Side-by-side timing: variants of one computation, checked against the truth first, then run turn by turn so that drift hits all alike."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
FIELDS = ("date", "commit", "device", "threads", "torch", "case", "mode", "variant", "p20_ms", "p50_ms", "p80_ms", "speedup_over_eager")


class WrongResult(AssertionError):
    """A variant failed its check; its time would mean nothing."""


@dataclass
class Row:
    """Milliseconds of one variant of one case."""

    case: str
    mode: str
    variant: str
    p20: float
    p50: float
    p80: float
    speedup: float


@dataclass
class Session:
    """The rows of one run, and where they were measured."""

    rows: list[Row] = field(default_factory=list)

    def compare(
        self,
        case: str,
        mode: str,
        variants: dict[str, Callable[[], Tensor | Sequence[Tensor]]],
        truth: Sequence[Tensor],
        *,
        factor: float = 2.0,
        seconds: float = 2.0,
    ) -> dict[str, float]:
        """Times every variant and returns its speed-up over the variant "eager", which must be there.

        truth: the outputs in float64. A variant whose error is more than factor times eager's raises WrongResult before anything is timed.
        """
        eager_errors = _errors(variants["eager"](), truth)
        for name, run in variants.items():
            _check(name, _errors(run(), truth), eager_errors, truth, factor)
        samples = _interleave(variants, seconds)
        base = statistics.median(samples["eager"])
        for name, times in samples.items():
            p20, p50, p80 = (1e3 * q for q in (_quantile(times, 0.2), _quantile(times, 0.5), _quantile(times, 0.8)))
            self.rows.append(Row(case, mode, name, p20, p50, p80, 1e3 * base / p50))
        return {name: base / statistics.median(times) for name, times in samples.items()}

    def table(self) -> list[str]:
        """The rows as text, one case after another."""
        lines = [f"{'case':44} {'mode':10} {'variant':10} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'x eager':>8}"]
        for r in self.rows:
            lines.append(f"{r.case:44} {r.mode:10} {r.variant:10} {r.p20:9.3f} {r.p50:9.3f} {r.p80:9.3f} {r.speedup:8.2f}")
        return lines

    def save(self, path: Path) -> None:
        """Appends the rows, with their provenance, to a CSV file."""
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(FIELDS)
            where = (
                datetime.now(timezone.utc).isoformat(timespec="seconds"),
                _commit(),
                device_name(),
                torch.get_num_threads(),
                torch.__version__,
            )
            for r in self.rows:
                writer.writerow((*where, r.case, r.mode, r.variant, *(f"{t:.4f}" for t in (r.p20, r.p50, r.p80)), f"{r.speedup:.3f}"))


def device_name() -> str:
    """The GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def forward_backward(fn: Callable[..., Tensor | Sequence[Tensor]], leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> Callable:
    """fn of the leaves and its gradients, for upstream gradients, as one call without arguments."""

    def run() -> tuple[Tensor, ...]:
        outputs = fn(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

    return run


def _errors(outputs: Tensor | Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [(o.detach().double() - t).abs().max().item() for o, t in zip(outputs, truth, strict=True)]


def _check(name: str, errors: list[float], eager: list[float], truth: Sequence[Tensor], factor: float) -> None:
    for i, (error, allowed, t) in enumerate(zip(errors, eager, truth, strict=True)):
        rounding = torch.finfo(torch.float32).eps * t.abs().max().item()
        if not error <= max(factor * allowed, rounding):
            raise WrongResult(f"{name}: output {i} is {error:.3e} from the truth; eager {allowed:.3e}, one rounding {rounding:.3e}")


def _interleave(variants: dict[str, Callable], seconds: float) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(samples["eager"]) < 5:
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            _synchronise()
            samples[name].append(time.perf_counter() - start)
    return samples


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip() or "unknown"
