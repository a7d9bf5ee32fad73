"""Searches launch configurations on the GPU at hand: `python -m benchmarks.tune --minutes 9.5`, again until it says that none is left.

The questions are those that the launchers themselves put (fastdiff_kernels/triton/_tuned.py) while the benchmarks' workloads run. For each,
beginning at the launcher's own answer, every field is doubled and halved in turn for as long as that makes the call faster by more than a
fiftieth. A configuration that spills registers, that cannot be launched, or whose result is farther from the truth than a benchmark allows
has no time. Answers go to fastdiff_kernels/tuned/sm_<capability>.csv one by one, so that a search that was cut off goes on where it was.

`--choices` measures instead which backend runs a call, and whether a compiled call is left to the compiler: the rows of choices.csv for
this device. That part runs on a CPU too.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import choose
from benchmarks.harness import Check
from benchmarks.provenance import device_name, version
from benchmarks.timing import interleave
from benchmarks.workloads import Case, cases
from fastdiff_kernels import backend
from fastdiff_kernels.triton import _tuned
from fastdiff_kernels.triton._tuned import Question, answered_by, changed, fields, from_table

# Sweeps have widths that no network above has.
BENCHES = ("attention", "modulate", "rotary", "group_norm", "sweeps")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Least and most of each field that is searched; stages go by one, the others by factors of two.
RANGES = {
    "queries": (16, 256), "keys": (16, 256), "rows": (1, 256), "chunk": (32, 16384), "warps": (1, 16), "stages": (1, 5),
}  # fmt: skip
GAIN = 0.02
LEFT = 75

Launch = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Target:
    """One question, a case in which it comes up, and the launcher's own answer."""

    question: Question
    case: Case
    own: Launch


@dataclass(frozen=True)
class Found:
    """The best configuration, its speed-up over the launcher's own, and how many were tried and had no time."""

    launch: Launch
    speedup: float
    tried: int
    excluded: int


def searched(sizes: Any) -> Launch:
    """The fields of a launcher's answer that may be changed."""
    return tuple((name, value) for name, value in fields(sizes).items() if name in RANGES)


def neighbours(launch: Launch) -> Iterator[Launch]:
    """Every configuration that differs in one field by one step."""
    for i, (name, value) in enumerate(launch):
        least, most = RANGES[name]
        for other in (value - 1, value + 1) if name == "stages" else (value // 2, 2 * value):
            if least <= other <= most:
                yield (*launch[:i], (name, other), *launch[i + 1 :])


def search(own: Launch, seconds: Callable[[Sequence[Launch]], Mapping[Launch, float]]) -> Found:
    """The way down from a launcher's own answer. seconds(launches) times them turn by turn, and leaves out those that may not be used.

    Raises:
        ValueError: the launcher's own answer may not be used.
    """
    best, tried, excluded, speedup = own, {own}, 0, 1.0
    while fresh := [launch for launch in neighbours(best) if launch not in tried]:
        times = seconds([best, *fresh])
        if best not in times:
            raise ValueError(f"{_tuned.spell(dict(best))} cannot be used")
        tried.update(fresh)
        excluded += len(fresh) + 1 - len(times)
        fastest = min(times, key=lambda launch: times[launch])
        if times[fastest] > (1 - GAIN) * times[best]:
            break
        # Each ratio is of one run; times of different runs do not compare.
        speedup *= times[best] / times[fastest]
        best = fastest
    return Found(best, speedup, len(tried), excluded)


def targets(todo: Iterable[Case], answered: set[Question], device: str) -> Iterator[Target]:
    """The questions that come up in these cases, each once, but for those that have been answered."""
    for case in todo:
        asked: dict[Question, Launch] = {}

        def answers(question: Question, sizes: Any, asked: dict[Question, Launch] = asked) -> Any:
            asked.setdefault(question, searched(sizes))
            return from_table(question, sizes)

        args = case.inputs(case.dtype, device)
        upstream = [torch.randn_like(o) for o in Case(case.workload, case.dtype, "forward").bind(case.workload.eager, args, [])()]
        with answered_by(answers), backend("triton"):
            case.bind(case.workload.ours, args, upstream)()
        for question, own in asked.items():
            if question not in answered:
                answered.add(question)
                yield Target(question, case, own)


class Trials:
    """Times configurations of one target, after each has been checked."""

    def __init__(self, target: Target, device: str, timer: Callable[[Mapping[str, Callable]], Mapping[str, float]] | None = None) -> None:
        self.target, self.device = target, device
        self.timer = timer or self._interleaved
        self.check = Check.of(target.case, device)
        self.known: dict[Launch, bool] = {}

    def __call__(self, launches: Sequence[Launch]) -> dict[Launch, float]:
        usable = [launch for launch in launches if self._usable(launch)]
        times = self.timer({_tuned.spell(dict(launch)): self._run(launch) for launch in usable})
        return {launch: times[_tuned.spell(dict(launch))] for launch in usable}

    def _run(self, launch: Launch) -> Callable[[], Any]:
        run = self.check.bind(self.target.case.workload.ours)

        def answers(question: Question, sizes: Any) -> Any:
            return changed(sizes, dict(launch)) if question == self.target.question else from_table(question, sizes)

        def call() -> Any:
            with answered_by(answers), backend("triton"):
                return run()

        return call

    def _usable(self, launch: Launch) -> bool:
        if launch not in self.known:
            try:
                with compiled_kernels() as kernels:
                    wrong = self.check.wrong(self._run(launch))
                self.known[launch] = wrong is None and not any(kernel.n_spills for kernel in kernels)
            except Exception as error:
                # Too much shared memory, a size that the compiler refuses: each has an exception of its own.
                print(f"    {_tuned.spell(dict(launch))}: {type(error).__name__}", flush=True)
                self.known[launch] = False
        return self.known[launch]

    def _interleaved(self, runs: Mapping[str, Callable]) -> dict[str, float]:
        return {name: times.median for name, times in interleave(runs, 0.1 * len(runs), self.device).items()}


@contextmanager
def compiled_kernels() -> Iterator[list[Any]]:
    """The Triton kernels that are launched within it, as the driver loaded them."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        kernels.append(kernel)
        return kernel

    with mock.patch.object(JITFunction, "run", recorded):
        yield kernels


def answered(path: Path, gpu: int) -> set[Question]:
    """The questions that a file has rows for."""
    return {Question(row["kernel"], gpu, row["dtype"], int(row["size"])) for row in _tuned.read(path)}


def append(path: Path, target: Target, found: Found, where: str) -> None:
    """One row more."""
    q = target.question
    evidence = f"{where}; {found.tried} tried, {found.excluded} excluded; {target.case}"
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(_tuned.COLUMNS)
        writer.writerow((q.kernel, q.dtype, q.size, _tuned.spell(dict(found.launch)), f"{found.speedup:.3f}", evidence))
    _tuned.forget()


def tune(
    todo: Sequence[Case], path: Path, gpu: int, device: str, deadline: float, trials: Callable[[Target], Callable] | None = None
) -> int:
    """Answers questions until the deadline (of time.monotonic); returns how many cases are left."""
    done = answered(path, gpu)
    where = f"{device_name(device)}; torch {torch.__version__}; triton {version('triton')}"
    for i, case in enumerate(todo):
        for target in targets([case], done, device):
            if time.monotonic() > deadline:
                return len(todo) - i
            found = search(target.own, Trials(target, device) if trials is None else trials(target))
            append(path, target, found, where)
            q = target.question
            print(
                f"[{i + 1}/{len(todo)}] {q.kernel} {q.dtype} {q.size}: {_tuned.spell(dict(found.launch))}, {found.speedup:.2f}x of"
                f" {_tuned.spell(dict(target.own))} ({found.tried} tried, {found.excluded} excluded)",
                flush=True,
            )
    return 0


def workload_cases(dtypes: Sequence[torch.dtype] = DTYPES) -> list[Case]:
    """All cases of the families whose launchers ask, the most wanted dtype first."""
    workloads = [w for name in BENCHES for w in importlib.import_module(f"benchmarks.bench_{name}").WORKLOADS]
    return [case for dtype in dtypes for case in cases(workloads, [dtype])]


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0: all is answered; 75: some is left; 2: there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="begin nothing new after this long (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_tuned.FOLDER.parent, help="folder of tuned/ and choices.csv (default: the package)")
    parser.add_argument("--choices", action="store_true", help="measure backends for choices.csv instead of launch configurations")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    if arguments.choices:
        return LEFT if choose.update(arguments.out / "choices.csv", deadline) else 0
    if not torch.cuda.is_available():
        print(
            "tune: torch finds no GPU, so no launch configuration can be measured and no table was written; "
            "on this CPU `python -m benchmarks.tune --choices` measures what a compiled call is left to",
            file=sys.stderr,
        )
        return 2
    major, minor = torch.cuda.get_device_capability()
    gpu = 10 * major + minor
    path = _tuned.path_of(gpu, arguments.out / "tuned")
    left = tune(workload_cases(), path, gpu, "cuda", deadline)
    print(f"{path}: {len(_tuned.read(path))} rows; " + (f"{left} cases left, run it again" if left else "nothing left"))
    return LEFT if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
