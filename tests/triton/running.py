"""Runs Triton tests without a GPU: in the interpreter, and as far as machine code for the GPUs supported."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).parents[2]
CAPABILITIES = (80, 86, 89, 90, 100, 120)
BUDGETS = ROOT / "tests" / "budgets"
# Set by `pytest --update-budgets`.
update_budgets = False
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def run_interpreted(test_file: str) -> None:
    """Runs the tests marked `executes` of a file with the interpreter on; does nothing on a GPU, where they run as they are."""
    if torch.cuda.is_available():
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test_file]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    if result.returncode != 0:
        pytest.fail(f"in the interpreter:\n{result.stdout}\n{result.stderr}", pytrace=False)


@dataclass(frozen=True)
class Binary:
    """What one launch compiles to for one GPU."""

    kernel: str
    capability: int
    registers: int
    stack: int
    """Bytes of local memory a thread, where spilled registers go."""
    shared: int


class _NoDriver:
    """Stands for the driver of a GPU that is not there, for as long as nothing is launched."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device.
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0


def compile_launches(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Binary]:
    """Compiles every launch that call() makes through a family's `launch`, specialised as the launch itself would be, for every capability.

    call() gets CPU tensors; nothing runs, so what it returns is not written. It is called once for each capability, which a launcher that
    asks `_common.capability` is told.
    """
    launches: list[tuple] = []

    def record(kernel, _programs, *args, num_warps=4, enable_fp_fusion=True, **constants):
        launches.append((kernel, args, {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion, **constants}))

    modules = [m for name, m in sys.modules.items() if name.startswith("fastdiff_kernels.triton.") and hasattr(m, "launch")]
    found = []
    for capability in CAPABILITIES:
        launches.clear()
        for module in modules:
            monkeypatch.setattr(module, "launch", record)
            if hasattr(module, "capability"):
                monkeypatch.setattr(module, "capability", lambda _tensor, capability=capability: capability)
        call()
        assert launches, "the call launched no kernel"
        found += [(i, _compile(*launch, capability)) for i, launch in enumerate(launches)]
    return [binary for _, binary in sorted(found, key=lambda item: item[0])]


def _compile(kernel: triton.JITFunction, args: tuple, options: dict, capability: int) -> Binary:
    with mock.patch.object(triton.runtime.driver, "_active", _NoDriver(capability)):
        compiled = kernel.warmup(*args, grid=(1,), **options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Binary(kernel.__name__, capability, usage["REG"], usage["STACK"], usage["SHARED"] + compiled.metadata.shared)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}


def check_budgets(family: str, cases: dict[str, Callable[[], object]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles the launches of every case for every capability: none spills, none takes more registers or shared memory than its budget.

    Budgets stand in tests/budgets/<family>.csv, written by `pytest --update-budgets`. They are one Triton version's: another version
    is held to the absence of spills alone.
    """
    found = []
    for case, call in cases.items():
        with monkeypatch.context() as patch:
            launches = compile_launches(call, patch)
        for i, b in enumerate(launches):
            assert b.stack == 0, f"{case}: {b} spills"
            found.append((case, str(i // len(CAPABILITIES)), b.kernel, str(b.capability), triton.__version__, b.registers, b.shared))
    path = BUDGETS / f"{family}.csv"
    if update_budgets:
        BUDGETS.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("case", "launch", "kernel", "capability", "triton", "registers", "shared"), *found])
        return
    with path.open(newline="") as file:
        budgets = {tuple(row[:4]): row[4:] for row in csv.reader(file)}
    assert {row[:4] for row in found} == budgets.keys() - {("case", "launch", "kernel", "capability")}, "run pytest --update-budgets"
    for *key, version, registers, shared in found:
        written, most_registers, most_shared = budgets[tuple(key)]
        if version == written:
            assert registers <= int(most_registers), f"{key}: {registers} registers, budget {most_registers}"
            assert shared <= int(most_shared), f"{key}: {shared} bytes of shared memory, budget {most_shared}"
