"""Rows of a results file, as `pytest benchmarks --save-rows` appends them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One provider of one case, in one run. What was not measured is None."""

    date: str
    commit: str
    device: str
    threads: str
    torch: str
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
    gb_per_s: float | None
    of_copy: float | None
    tflop_per_s: float | None
    of_matmul: float | None
    launch_bound: bool
    peak_mb: float | None
    s_per_1000: float | None = None
    """Seconds for a thousand samples, where samples were drawn."""
    timed: str = ""
    clock_mhz: float | None = None
    absent: str = ""
    """Libraries that were not installed, and so were not compared with."""

    @property
    def case(self) -> tuple[str, ...]:
        """What was computed, and on what device: rows of one case compare."""
        return self.device, self.op, self.network, self.shape, self.dtype, self.mode

    @property
    def spread(self) -> float:
        """Half of the middle three fifths of the times, relative to their median."""
        return (self.p80_ms - self.p20_ms) / (2 * self.p50_ms)


_NUMBERS = ("p20_ms", "p50_ms", "p80_ms", "x_eager")
_OPTIONAL = ("x_compile", "x_best_rival", "gb_per_s", "of_copy", "tflop_per_s", "of_matmul", "peak_mb", "s_per_1000", "clock_mhz")
# Columns that earlier files do not have.
_LATER = ("s_per_1000", "timed", "clock_mhz", "absent")


def read(path: str | Path) -> list[Row]:
    """All rows of a file, oldest first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no results file, naming the columns that it lacks.
    """
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in Row.__dataclass_fields__ if name not in (*(reader.fieldnames or ()), *_LATER)]
        if missing:
            raise ValueError(f"{path}: not a file of benchmark rows, the columns {', '.join(missing)} are missing")
        return [_row(values) for values in reader]


def _row(values: dict[str, str]) -> Row:
    kept: dict[str, Any] = {name: values.get(name, "") for name in Row.__dataclass_fields__}
    kept |= {name: float(kept[name]) for name in _NUMBERS}
    kept |= {name: float(kept[name]) if kept[name] else None for name in _OPTIONAL}
    return Row(**kept | {"launch_bound": kept["launch_bound"] == "True"})


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of every case the rows of its last run, in the order of the file."""
    rows = list(rows)
    newest: dict[tuple[str, ...], str] = {}
    for row in rows:
        newest[row.case] = max(row.date, newest.get(row.case, ""))
    return [row for row in rows if row.date == newest[row.case]]


def by_case(rows: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Rows by case, then by provider."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.provider] = row
    return cases


def at_commit(rows: Sequence[Row], commit: str) -> Iterator[Row]:
    """Rows measured at a commit, given by its first digits."""
    return (row for row in rows if row.commit.startswith(commit))
