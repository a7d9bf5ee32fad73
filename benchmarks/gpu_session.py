"""Everything there is to do on a GPU, in pieces: `python -m benchmarks.gpu_session --out out/gpu --minutes 10`, again until all are done.

Each piece's output goes to <out>/<piece>.log, rows to <out>/rows.csv. A piece that has finished, well or not, is not run again; one that
was cut off by the end of the time is, of benchmarks the cases that it had not come to. `summary.txt` says what passed, what failed and what
is left.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Families in the order of what is most wanted of a GPU.
BENCHES = (
    "modulate", "attention", "group_norm", "rotary", "blocks", "end_to_end", "training", "score_matching", "distillation", "skipping",
    "sampling", "schedule", "integrations", "sweeps",
)  # fmt: skip
CEILINGS = """
import torch
from benchmarks.ceilings import copy_bandwidth, matmul_rate
print(torch.cuda.get_device_name())
print(f"copy {copy_bandwidth('cuda') / 1e9:.0f} GB/s")
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    print(f"matmul {dtype} {matmul_rate('cuda', dtype) / 1e12:.0f} TFLOP/s")
"""


@dataclass(frozen=True)
class Piece:
    """One command, and what has to be on PATH for it."""

    name: str
    command: tuple[str, ...]
    needs: str | None = None


def pieces(out: Path) -> list[Piece]:
    """All there is to do, most wanted first."""
    python = sys.executable
    brief = (python, "-m", "pytest", "--seconds=0.25")
    test = (python, "-m", "pytest", "-q", "-m", "gpu")
    sanitize = ("compute-sanitizer", "--error-exitcode", "9", *test, "tests/test_gpu.py", "-k", "two_runs and -0-")

    def bench(*chosen: str) -> tuple[str, ...]:
        # Many minutes where shapes are many: what a piece that was cut off has measured is not measured again.
        return (*brief, *chosen, f"--save-rows={out / 'rows.csv'}", "--resume")

    return [
        Piece("environment", (python, "-m", "fastdiff_kernels.cli", "doctor")),
        Piece("driver", ("nvidia-smi",), needs="nvidia-smi"),
        Piece("ceilings", (python, "-c", CEILINGS)),
        Piece("parity", (*test, "tests/test_gpu.py")),
        Piece("triton", (python, "-m", "pytest", "-q", "tests/triton")),
        Piece("families", (*test, "tests", "--ignore=tests/test_gpu.py", "--ignore=tests/triton")),
        *(Piece(f"bench_{family}", bench(f"benchmarks/bench_{family}.py")) for family in BENCHES),
        Piece("sanitizer", sanitize, needs="compute-sanitizer"),
        Piece("bench_float32", bench("benchmarks", "--dtype=float32")),
        Piece("bench_float16", bench("benchmarks", "--dtype=float16")),
        Piece(
            "bench_max_autotune",
            (*brief, "benchmarks", "--network=DiT-XL/2", "--max-autotune", f"--save-rows={out / 'max_autotune.csv'}", "--resume"),
        ),
    ]


def run(todo: Sequence[Piece], out: Path, seconds: float) -> dict[str, str]:
    """Runs what is left of todo until the time is up; returns what became of each piece."""
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state.json"
    status: dict[str, str] = json.loads(state.read_text()) if state.exists() else {}
    deadline = time.monotonic() + seconds
    for piece in todo:
        if piece.name in status:
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            break
        if (outcome := _run_one(piece, out / f"{piece.name}.log", left)) is None:
            break
        status[piece.name] = outcome
        state.write_text(json.dumps(status, indent=1))
    complete = {piece.name: status.get(piece.name, "left") for piece in todo}
    (out / "summary.txt").write_text("".join(f"{outcome:10} {name}\n" for name, outcome in complete.items()))
    return complete


def _run_one(piece: Piece, log: Path, seconds: float) -> str | None:
    """What became of a piece; None if it ran out of time."""
    if piece.needs is not None and shutil.which(piece.needs) is None:
        log.write_text(f"{piece.needs} is not installed\n")
        return "absent"
    with log.open("w") as file:
        try:
            done = subprocess.run(piece.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
    return "passed" if done.returncode == 0 else f"failed {done.returncode}"


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
    return 75 if "left" in status.values() else 0


if __name__ == "__main__":
    raise SystemExit(main())
