"""Launch configurations that were measured on a GPU, in place of the analytic ones: the rows of tuned/sm_<capability>.csv.

A launcher puts a question, which kernel on what GPU for what elements and size, together with its own answer. Neither knows the batch, so
that a sample's result does not depend on it. A GPU without a file, and a question without a row, keep the launcher's answer.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch

COLUMNS = ("kernel", "dtype", "size", "launch", "speedup", "evidence")
FOLDER = Path(str(files("fastdiff_kernels"))) / "tuned"

Launch = Mapping[str, int]
# A dataclass or a named tuple of numbers, or with numbers among its fields.
Sizes = TypeVar("Sizes")


@dataclasses.dataclass(frozen=True)
class Question:
    """What a launcher asks; `size` is the width that its rule goes by."""

    kernel: str
    gpu: int
    dtype: str
    size: int


Answers = Callable[[Question, Any], Any]
_answers: Answers | None = None


def tuned(kernel: str, gpu: int, dtype: torch.dtype, size: int, analytic: Sizes) -> Sizes:
    """`analytic` with the fields that the table has for this kernel, GPU (90 for capability 9.0), dtype and size."""
    if _answers is None and not _rows(gpu):
        return analytic
    question = Question(kernel, gpu, str(dtype).removeprefix("torch."), size)
    return from_table(question, analytic) if _answers is None else _answers(question, analytic)


def from_table(question: Question, analytic: Sizes) -> Sizes:
    """The table's answer."""
    row = _rows(question.gpu).get((question.kernel, question.dtype, question.size))
    return analytic if row is None else changed(analytic, row)


def changed(sizes: Any, launch: Launch) -> Any:
    """sizes with these fields.

    Raises:
        ValueError: sizes has no such field.
    """
    if unknown := launch.keys() - fields(sizes).keys():
        raise ValueError(f"{type(sizes).__name__} has no {', '.join(sorted(unknown))}; its fields are {', '.join(fields(sizes))}")
    return sizes._replace(**launch) if hasattr(sizes, "_replace") else dataclasses.replace(sizes, **launch)


def fields(sizes: Any) -> dict[str, Any]:
    """The fields of such a dataclass or named tuple."""
    return sizes._asdict() if hasattr(sizes, "_asdict") else dataclasses.asdict(sizes)


@contextmanager
def answered_by(answers: Answers) -> Iterator[None]:
    """Within it every question goes to `answers` with the launcher's own answer: how the search tries configurations."""
    global _answers
    before, _answers = _answers, answers
    try:
        yield
    finally:
        _answers = before


def path_of(gpu: int, folder: Path | None = None) -> Path:
    """Where a GPU's rows stand."""
    return (FOLDER if folder is None else folder) / f"sm_{gpu}.csv"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none where there is no file.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path.name}: the columns must be {', '.join(COLUMNS)}, got {', '.join(reader.fieldnames or ())}")
        return list(reader)


def parse(launch: str) -> dict[str, int]:
    """ "warps=4 stages=3" as a mapping."""
    return {name: int(value) for name, value in (part.split("=") for part in launch.split())}


def spell(launch: Launch) -> str:
    """The reverse of `parse`."""
    return " ".join(f"{name}={value}" for name, value in launch.items())


@functools.cache
def _rows(gpu: int) -> dict[tuple[str, str, int], dict[str, int]]:
    return {(row["kernel"], row["dtype"], int(row["size"])): parse(row["launch"]) for row in read(path_of(gpu))}


forget = _rows.cache_clear
"""To be called when a file has been written."""
