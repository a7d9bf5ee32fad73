"""Where and when rows were measured."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from .rivals import absent


@dataclass(frozen=True)
class Provenance:
    """The first columns of every row."""

    date: str
    commit: str
    device: str
    threads: int
    torch: str
    triton: str
    driver: str
    absent: str
    """Libraries that there was no comparison with, since they are not installed."""

    @classmethod
    def here(cls, device: str) -> Provenance:
        return cls(
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
            _commit(),
            device_name(device),
            torch.get_num_threads(),
            torch.__version__,
            version("triton"),
            _driver() if device == "cuda" else "",
            " ".join(absent()),
        )


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    """Of an installed package; empty where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


@functools.cache
def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
