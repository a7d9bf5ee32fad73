"""Two runs side by side: which cases became slower or faster by more than their noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .rows import Row, by_case, latest

LEAST = 0.03
"""Relative changes below this are called noise however quiet the runs were."""
SIGMAS = 2.0


@dataclass(frozen=True)
class Change:
    """One case's time relative to eager in its own run, run B over run A, and how far noise alone may move it."""

    case: tuple[str, ...]
    ratio: float
    noise: float

    @property
    def verdict(self) -> str:
        if abs(math.log(self.ratio)) <= math.log1p(max(LEAST, SIGMAS * self.noise)):
            return "noise"
        return "slower" if self.ratio > 1 else "faster"


def compare(a: Iterable[Row], b: Iterable[Row]) -> list[Change]:
    """The changes of ours from run a to run b in the cases that both have, worst first.

    Times of different runs do not compare, since machines drift; what compares is the ratio to eager, which ran turn by turn with it. By
    as much as the ratios of others' providers moved in the case, whose code no commit here changes, eager itself has moved: that is noise.
    """
    before, after = by_case(latest(a)), by_case(latest(b))
    shared = [case for case in before if case in after and {"eager", "ours"} <= before[case].keys() & after[case].keys()]
    return sorted((_change(case, before[case], after[case]) for case in shared), key=lambda change: -change.ratio)


def _change(case: tuple[str, ...], before: Mapping[str, Row], after: Mapping[str, Row]) -> Change:
    def ratio(provider: str) -> float:
        return before[provider].x_eager / after[provider].x_eager

    others = [name for name in before.keys() & after.keys() if not name.startswith(("eager", "ours"))]
    moved = max((math.expm1(abs(math.log(ratio(name)))) for name in others), default=0.0)
    spreads = [row.spread for run in (before, after) for row in (run["eager"], run["ours"])]
    return Change(case, ratio("ours"), math.hypot(moved, *spreads))


def table(changes: list[Change]) -> str:
    """The changes as text."""
    lines = [f"{'verdict':8} {'time B/A':>9} {'noise':>7}  case"]
    lines += [f"{c.verdict:8} {c.ratio:9.3f} {c.noise:7.3f}  {' '.join(part for part in c.case[1:] if part)}" for c in changes]
    return "\n".join(lines)
