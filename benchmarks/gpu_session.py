"""Everything there is to do on a GPU, in pieces: `python -m benchmarks.gpu_session --out out/gpu --minutes 10`, again until all are done.

Each piece's output goes to <out>/<piece>.log, rows to <out>/rows.csv. A piece that has finished, well or not, is not run again; one that
was cut off by the end of the time is, after those that have not been tried as often, and of tests and benchmarks what had not passed. So
neither a piece nor a test that never ends keeps the others from being run. `summary.txt` says what passed, what failed and what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Families in the order of what is most wanted of a GPU.
BENCHES = (
    "modulate", "attention", "group_norm", "rotary", "blocks", "end_to_end", "training", "score_matching", "distillation", "estimators",
    "skipping", "sampling", "schedule", "integrations", "sweeps",
)  # fmt: skip
CEILINGS = """
import torch
from benchmarks.ceilings import copy_bandwidth, matmul_rate
print(torch.cuda.get_device_name())
print(f"copy {copy_bandwidth('cuda') / 1e9:.0f} GB/s")
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    print(f"matmul {dtype} {matmul_rate('cuda', dtype) / 1e12:.0f} TFLOP/s")
"""


# And a number: what became of a piece that ran out of time so often.
CUT_OFF = "cut off"


@dataclass(frozen=True)
class Piece:
    """One command, and what has to be on PATH for it."""

    name: str
    command: tuple[str, ...]
    needs: str | None = None


def pieces(out: Path) -> list[Piece]:
    """All there is to do, most wanted first."""
    python = sys.executable

    def test(name: str, *chosen: str, under: tuple[str, ...] = (), needs: str | None = None) -> Piece:
        command = (*under, python, "-m", "pytest", "-q", "-p", "benchmarks.unfinished", f"--unfinished={out / name}.tests", *chosen)
        return Piece(name, command, needs)

    def bench(name: str, *chosen: str, rows: str = "rows.csv") -> Piece:
        return test(name, "--seconds=0.25", f"--save-rows={out / rows}", *chosen)

    sanitizer = ("compute-sanitizer", "--error-exitcode", "9")
    return [
        Piece("environment", (python, "-m", "fastdiff_kernels.cli", "doctor")),
        Piece("driver", ("nvidia-smi",), needs="nvidia-smi"),
        Piece("ceilings", (python, "-c", CEILINGS)),
        test("parity", "-m", "gpu", "tests/test_gpu.py"),
        test("triton", "tests/triton"),
        Piece("synchronisations", (python, "-m", "benchmarks.synchronisations")),
        test("families", "-m", "gpu", "tests", "--ignore=tests/test_gpu.py", "--ignore=tests/triton"),
        *(bench(f"bench_{family}", f"benchmarks/bench_{family}.py") for family in BENCHES),
        test("sanitizer", "-m", "gpu", "tests/test_gpu.py", "-k", "two_runs and -0-", under=sanitizer, needs=sanitizer[0]),
        bench("bench_float32", "benchmarks", "--dtype=float32"),
        bench("bench_float16", "benchmarks", "--dtype=float16"),
        bench("bench_max_autotune", "benchmarks", "--network=DiT-XL/2", "--network=EDM", "--max-autotune", rows="max_autotune.csv"),
    ]


def run(todo: Sequence[Piece], out: Path, seconds: float) -> dict[str, str]:
    """Runs what is left of todo until the time is up; returns what became of each piece."""
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state.json"
    status: dict[str, str] = json.loads(state.read_text()) if state.exists() else {}
    deadline = time.monotonic() + seconds
    for piece in sorted((piece for piece in todo if not _finished(status.get(piece.name))), key=lambda p: _tries(status.get(p.name))):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        outcome = _run_one(piece, out / f"{piece.name}.log", left)
        status[piece.name] = outcome or f"{CUT_OFF} {_tries(status.get(piece.name)) + 1}"
        state.write_text(json.dumps(status, indent=1))
    complete = {piece.name: status.get(piece.name, "left") for piece in todo}
    (out / "summary.txt").write_text("".join(f"{outcome:10} {name}\n" for name, outcome in complete.items()))
    return complete


def _finished(outcome: str | None) -> bool:
    return outcome is not None and not outcome.startswith(CUT_OFF)


def _tries(outcome: str | None) -> int:
    """How often the time was up before a piece that has not finished was done."""
    return int(outcome.removeprefix(CUT_OFF)) if outcome is not None else 0


def _run_one(piece: Piece, log: Path, seconds: float) -> str | None:
    """What became of a piece; None if it ran out of time."""
    if piece.needs is not None and shutil.which(piece.needs) is None:
        log.write_text(f"{piece.needs} is not installed\n")
        return "absent"
    with log.open("a") as file:
        running = subprocess.Popen(piece.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = running.wait(seconds)
        except subprocess.TimeoutExpired:
            # With what it has started itself, which would go on using the GPU.
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            return None
    return "passed" if status == 0 else f"failed {status}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs pieces; the status is 0 when all have passed, 1 when one has failed, 75 when some are left."""
    parser = argparse.ArgumentParser(description="GPU tests, sanitizer and benchmarks in resumable pieces.")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", help="one folder for everything (default: out/gpu)")
    parser.add_argument("--minutes", type=float, default=9.5, help="stop after this long (default: %(default)s)")
    arguments = parser.parse_args(argv)
    out = arguments.out.resolve()
    status = run(pieces(out), out, 60 * arguments.minutes)
    print((out / "summary.txt").read_text(), end="")
    if any(outcome.startswith("failed") for outcome in status.values()):
        return 1
    return 0 if all(outcome != "left" and _finished(outcome) for outcome in status.values()) else 75


if __name__ == "__main__":
    raise SystemExit(main())
