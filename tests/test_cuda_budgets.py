"""What the CUDA C++ kernels of the compiled library take of a GPU: none spills, none more registers or shared memory than its budget."""

from __future__ import annotations

import csv
import re
import subprocess
from pathlib import Path

import pytest

from fastdiff_kernels import _loader

from .triton.running import BUDGETS, CUOBJDUMP

FIELDS = ("kernel", "arch", "nvcc", "registers", "shared", "stack")

pytestmark = pytest.mark.skipif(not (_loader.build_report() or {}).get("cuda"), reason="the library was built without CUDA")


def usages() -> list[dict[str, str]]:
    """One row for each kernel and architecture of the compiled library, spills among them."""
    library = Path(_loader.__file__).with_name("_native.so")
    dump = subprocess.run([CUOBJDUMP, "--dump-resource-usage", library], capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["c++filt"], input=dump, capture_output=True, text=True, check=True).stdout
    rows, arch = [], ""
    for line in names.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (.+):$", line):
            kernel = re.sub(r"\(anonymous namespace\)::|fastdiff::|^void ", "", found[1]).partition("(")[0]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = found.groups()
            nvcc = _loader.build_report()["cuda"]
            rows.append({"kernel": kernel, "arch": arch, "nvcc": nvcc, "registers": registers, "shared": shared, "stack": stack})
    return rows


def test_no_kernel_spills_or_exceeds_its_budget(request):
    rows = usages()
    assert rows, "the library was built with CUDA and has no kernel"
    assert [row for row in rows if row["stack"] != "0"] == []
    path = BUDGETS / "cuda.csv"
    if request.config.getoption("--update-budgets"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: (row["kernel"], row["arch"])))
    with path.open(newline="") as file:
        budgets = {(row["kernel"], row["arch"]): row for row in csv.DictReader(file)}
    # A compiler of another version, or one that knows fewer GPUs, has other needs.
    comparable = [row for row in rows if budgets.get((row["kernel"], row["arch"]), row)["nvcc"] == row["nvcc"]]
    for row in comparable:
        budget = budgets[row["kernel"], row["arch"]]
        for what in ("registers", "shared", "stack"):
            assert int(row[what]) <= int(budget[what]), f"{row['kernel']} on {row['arch']}: {row[what]} {what}, budget {budget[what]}"
