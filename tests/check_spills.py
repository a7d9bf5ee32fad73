"""Compiles the Triton kernels for every GPU supported in all the ways that users reach, and looks for spilled registers.

Where the compiler itself crashes counts too.

    python -m tests.check_spills [family ...] [--capability N ...] [--report] [--limit SECONDS]

Which ways those are stands in tests/triton/spill_cases.py. Launches that Triton would compile to the same code are compiled once; what each
took is written to out/spills.csv and not compiled again until its kernel changes. It ends with 1 if any launch spills or crashes or, with
--report or --limit, is left.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import multiprocessing
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from tqdm import tqdm

from tests.triton.running import CAPABILITIES, ROOT, Launch, record_launches
from tests.triton.spill_cases import FAMILIES

RESULTS = ROOT / "out" / "spills.csv"
COLUMNS = ("launch", "family", "case", "kernel", "capability", "registers", "stack", "shared")


def traits(arg: object) -> object:
    """What Triton specialises a kernel for in an argument, or more."""
    if isinstance(arg, torch.Tensor):
        return str(arg.dtype), arg.data_ptr() % 16 == 0
    if type(arg) is tuple:
        return tuple(map(traits, arg))
    if type(arg) is int:
        return "1" if arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31)
    return type(arg).__name__


@functools.cache
def code(kernel: triton.JITFunction) -> str:
    """What a kernel and all that it calls say. Triton's own key moves with the lines above a kernel as well."""
    used = (kernel.fn.__globals__.get(name) for name in kernel.fn.__code__.co_names)
    called = (code(u) if isinstance(u, triton.JITFunction) else f"{u!r}" for u in used if isinstance(u, (triton.JITFunction, tl.constexpr)))
    return "\n".join([kernel.src, *called])


def key(launch: Launch, capability: int) -> str:
    """A launch's name in the results: the same for launches with the same machine code."""
    compiled_for = [triton.__version__, code(launch.kernel), capability, traits(launch.args), sorted(launch.options.items())]
    return hashlib.sha256(repr(compiled_for).encode()).hexdigest()[:24]


def launches_of(families: Iterable[str], capabilities: Iterable[int] = CAPABILITIES) -> dict[str, tuple[str, str, int, Launch]]:
    """Family, case, capability and launch by key; each launch under the first case that makes it."""
    found: dict[str, tuple[str, str, int, Launch]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for family in families:
            for case, call in FAMILIES[family]():
                for capability in capabilities:
                    for launch in record_launches(call, capability, patch):
                        found.setdefault(key(launch, capability), (family, case, capability, launch))
    return found


def finished(results: Path) -> dict[str, dict[str, str]]:
    """Rows of earlier runs by key."""
    if not results.exists():
        return {}
    with results.open(newline="") as file:
        return {row["launch"]: row for row in csv.DictReader(file)}


class Compiler:
    """Compiles in a process of its own, which the compiler may end: LLVM has assertions."""

    def __init__(self, wanted: dict[str, tuple[str, str, int, Launch]]) -> None:
        self.wanted = wanted
        self.pool: ProcessPoolExecutor | None = None

    def compile(self, k: str) -> dict[str, str]:
        """The row of a launch; its numbers are "crash" where the compiler has ended."""
        if self.pool is None:
            # A forked process has the launches, which could not be sent to it.
            self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"), initializer=_forked.update, initargs=(self.wanted,))
        family, case, capability, launch = self.wanted[k]
        try:
            numbers = self.pool.submit(_compile, k).result()
        except BrokenProcessPool:
            self.pool, numbers = None, ("crash",) * 3
        values = (k, family, case, launch.kernel.__name__, capability, *numbers)
        return {name: str(value) for name, value in zip(COLUMNS, values, strict=True)}


_forked: dict[str, tuple[str, str, int, Launch]] = {}


def _compile(k: str) -> tuple[int, int, int]:
    _, _, capability, launch = _forked[k]
    binary = launch.compile(capability)
    return binary.registers, binary.stack, binary.shared


def compile_missing(wanted: dict[str, tuple[str, str, int, Launch]], done: dict[str, dict[str, str]], results: Path, limit: float) -> None:
    """Compiles what is not done yet for at most `limit` seconds, row by row into the results."""
    results.parent.mkdir(exist_ok=True)
    begun, compiler = time.monotonic(), Compiler(wanted)
    with results.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if file.tell() == 0:
            writer.writeheader()
        for k in tqdm([k for k in wanted if k not in done], unit="compile", dynamic_ncols=True):
            if time.monotonic() - begun > limit:
                return
            done[k] = compiler.compile(k)
            writer.writerow(done[k])
            file.flush()
            if done[k]["stack"] != "0":
                tqdm.write(spelled(done[k]))


def spelled(row: dict[str, str]) -> str:
    where = f"{row['family']}: {row['case']}: {row['kernel']} for sm_{row['capability']}"
    if row["stack"] == "crash":
        return f"{where}: the compiler crashes"
    return f"{where} has {row['stack']} bytes of stack beside {row['registers']} registers"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--capability", nargs="+", type=int, choices=CAPABILITIES, default=CAPABILITIES, metavar="N", help="80 for sm_80")
    parser.add_argument("--report", action="store_true", help="compile nothing: say what the results hold")
    parser.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="stop after so long; run again to go on")
    args = parser.parse_args()
    unknown = set(args.families) - FAMILIES.keys()
    if unknown:
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    families = args.families or list(FAMILIES)
    wanted, done = launches_of(families, args.capability), finished(RESULTS)
    if not args.report:
        compile_missing(wanted, done, RESULTS, args.limit)
    spilled = 0
    for family in families:
        own = [k for k, (of, *_) in wanted.items() if of == family]
        rows = [done[k] for k in own if k in done]
        spilling = [row for row in rows if row["stack"] != "0"]
        spilled += len(spilling)
        print(f"{family}: {len(rows)} of {len(own)} launches compiled, {len(spilling)} with spills or crashes")
        for row in spilling:
            print(f"  {spelled(row)}")
    return int(spilled > 0 or any(k not in done for k in wanted))


if __name__ == "__main__":
    raise SystemExit(main())
