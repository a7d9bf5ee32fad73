"""Runs Triton tests without a GPU: in the interpreter, and as far as machine code for the GPUs supported."""

from __future__ import annotations

import csv
import functools
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


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel as Triton would specialise it, with the arguments themselves forgotten."""

    kernel: triton.JITFunction
    args: tuple
    options: dict

    def compile(self, capability: int) -> Binary:
        with mock.patch.object(triton.runtime.driver, "_active", _NoDriver(capability)):
            compiled = self.kernel.warmup(*self.args, grid=(1,), **self.options)
        usage = _resource_usage(compiled.asm["cubin"])
        return Binary(self.kernel.__name__, capability, usage["REG"], usage["STACK"], usage["SHARED"] + compiled.metadata.shared)


def record_launches(call: Callable[[], object], capability: int, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches that call() makes through a family's `launch` on a GPU of a capability, which a launcher may ask `_common.capability`.

    call() gets tensors on the CPU or without data; nothing runs, so what it returns is not written.
    """
    launches = []

    def record(kernel, _programs, *args, num_warps=4, enable_fp_fusion=True, **constants):
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion, **constants}
        launches.append(Launch(kernel, tuple(map(_stand_in, args)), options))

    with monkeypatch.context() as patch:
        for module in [m for name, m in sys.modules.items() if name.startswith("fastdiff_kernels.triton.") and hasattr(m, "launch")]:
            patch.setattr(module, "launch", record)
            if hasattr(module, "capability"):
                patch.setattr(module, "capability", lambda _tensor: capability)
        call()
    assert launches, "the call launched no kernel"
    return launches


@functools.cache
def _elements(dtype: torch.dtype, aligned: bool) -> torch.Tensor:
    return torch.empty(32, dtype=dtype)[0 if aligned else 1 :]


def _stand_in(arg: object) -> object:
    """What a kernel is compiled for in an argument: of a tensor its dtype, and whether it begins at a multiple of 16 bytes."""
    if isinstance(arg, torch.Tensor):
        begins = arg.storage_offset() * arg.element_size() if arg.is_meta else arg.data_ptr()
        return _elements(arg.dtype, begins % 16 == 0)
    return tuple(map(_stand_in, arg)) if type(arg) is tuple else arg


def compile_launches(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Binary]:
    """Compiles the launches of `record_launches` for every capability; the first launch's binaries come first."""
    found = [
        (i, launch.compile(capability))
        for capability in CAPABILITIES
        for i, launch in enumerate(record_launches(call, capability, monkeypatch))
    ]
    return [binary for _, binary in sorted(found, key=lambda item: item[0])]


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", text)}


_COLUMNS = ("case", "launch", "kernel", "capability", "triton", "registers", "shared", "stack")


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
            key = (case, str(i // len(CAPABILITIES)), b.kernel, str(b.capability))
            found.append((*key, triton.__version__, b.registers, b.shared, b.stack))
    path = BUDGETS / f"{family}.csv"
    if update_budgets:
        BUDGETS.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([_COLUMNS, *found])
        return
    with path.open(newline="") as file:
        budgets = {tuple(row[:4]): row[4:] for row in csv.reader(file)}
    assert {row[:4] for row in found} == budgets.keys() - {_COLUMNS[:4]}, "run pytest --update-budgets"
    for *key, version, registers, shared, stack in found:
        written, most_registers, most_shared, most_stack = budgets[tuple(key)]
        assert stack <= int(most_stack), f"{key}: {stack} bytes of spilled registers, budget {most_stack}"
        if version == written:
            assert registers <= int(most_registers), f"{key}: {registers} registers, budget {most_registers}"
            assert shared <= int(most_shared), f"{key}: {shared} bytes of shared memory, budget {most_shared}"
