"""Which backend runs a call: the rows of `choices.csv`, of which the first that fits decides.

Columns: the op, with a compiled call's rotation behind "qk_norm_rope" if it has one; the device ("cpu", "cuda", or a capability such as
"sm_90"); the mode ("eager", or of calls that torch.compile traces "compiled" with gradients recorded, "compiled_inference" without); the
sizes it holds for, both ends included and an empty end open, in the rows and width that the op's `size` counts; the backend ("inductor":
under torch.compile the op's definition, for the compiler to fuse); and where the choice was measured.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass
from importlib.resources import files

import torch

MODES = ("eager", "compiled", "compiled_inference")


@dataclass(frozen=True)
class Choice:
    """One row of the table."""

    op: str
    device: str
    mode: str
    rows: tuple[float, float]
    width: tuple[float, float]
    backend: str
    evidence: str
    line: int

    def fits(self, op: str, devices: tuple[str, ...], mode: str, rows: int, width: int) -> bool:
        """Whether the row holds for such a call."""
        same = self.op == op and self.device in devices and self.mode == mode
        return same and self.rows[0] <= rows <= self.rows[1] and self.width[0] <= width <= self.width[1]

    def __str__(self) -> str:
        return f"line {self.line} of choices.csv ({self.evidence})"


def _range(low: str, high: str) -> tuple[float, float]:
    return float(low) if low else 0, float(high) if high else math.inf


@functools.cache
def table() -> tuple[Choice, ...]:
    """All rows, in order."""
    with (files(__package__) / "choices.csv").open() as file:
        return tuple(
            Choice(
                row["op"],
                row["device"],
                row["mode"],
                _range(row["min_rows"], row["max_rows"]),
                _range(row["min_width"], row["max_width"]),
                row["backend"],
                row["evidence"],
                line,
            )
            for line, row in enumerate(csv.DictReader(file), start=2)
        )


@functools.lru_cache(maxsize=4096)
def choose(op: str, devices: tuple[str, ...], mode: str, rows: int, width: int) -> Choice | None:
    """The first row for this op, one of these names of its device, this mode and size; None where there is none."""
    return next((choice for choice in table() if choice.fits(op, devices, mode, rows, width)), None)


@functools.cache
def device_names(device: torch.device) -> tuple[str, ...]:
    """What the table may call a device: a GPU by its capability, or by "cuda" alone."""
    if device.type != "cuda":
        return (device.type,)
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}", "cuda"
