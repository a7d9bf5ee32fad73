"""Times variants turn by turn, so that drift of the machine hits all alike.

On Linux a process keeps the memory that tensors on the CPU have freed, as CUDA's caching allocator does on a GPU. Else glibc gives it back
or not as its heap happens to lie, and the page faults of getting it again have doubled eager's times from one process to the next.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

LEAST_SAMPLES = 5
# More than the last cache of any GPU supported; it is read between two runs, so that neither finds its inputs there. Were it written, the
# run after would pay for the lines that have to go back to memory.
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Times:
    """What one variant took."""

    seconds: tuple[float, ...]
    launch_bound: bool = False
    """Whether the host took longer to submit the work than the device to do it; of a replayed graph, `seconds` are the device's alone."""
    how: str = "calls"
    """What was timed: "graph replay", or "calls" with all that the host does for them, of which "freed memory kept" says what it does."""
    clock_mhz: float | None = None
    """Of the processor, right after."""

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(variants: Mapping[str, Callable[[], object]], seconds: float, device: str, captured: bool = True) -> dict[str, Times]:
    """Runs every variant once per turn, for that many seconds in all and a few turns at least.

    On a GPU each is captured as a graph and its replay timed; without `captured`, the call from its start until the device has finished.
    """
    if device == "cuda":
        return _graphs(variants, seconds) if captured else _calls(variants, seconds, "cuda")
    return _calls(variants, seconds, device)


@functools.cache
def keep_freed_memory() -> bool:
    """Makes this process keep what it frees, if its C library can: no block is mapped by itself, and the heap is never trimmed."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(libc.mallopt(trim_threshold, -1)) and bool(libc.mallopt(mmap_max, 0))


def _calls(variants: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, Times]:
    gpu = device == "cuda"
    how = "calls, freed memory kept" if not gpu and keep_freed_memory() else "calls"
    wait = torch.cuda.synchronize if gpu else lambda: None
    for run in variants.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    flush = torch.empty(FLUSH_BYTES // 4, device="cuda") if gpu else None
    host = {name: _submission(run) for name, run in variants.items()} if gpu else dict.fromkeys(variants, 0.0)

    def turn() -> None:
        for name, run in variants.items():
            if flush is not None:
                flush.sum()
            wait()
            start = time.perf_counter()
            run()
            wait()
            samples[name].append(time.perf_counter() - start)

    _turns(turn, seconds)
    clock = clock_mhz(device)
    # The call ends when the device does; one that has submitted its work only just before was waited for.
    return {name: Times(tuple(taken), host[name] > 0.95 * statistics.median(taken), how, clock) for name, taken in samples.items()}


def _turns(turn: Callable[[], None], seconds: float) -> None:
    deadline = time.perf_counter() + seconds
    done = 0
    while time.perf_counter() < deadline or done < LEAST_SAMPLES:
        turn()
        done += 1


def _graphs(variants: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    """Each variant is captured once as a CUDA graph and replayed with cold caches, timed by events."""
    flush = torch.empty(FLUSH_BYTES // 4, device="cuda")
    graphs = {name: _capture(run) for name, run in variants.items()}
    host = {name: _submission(run) for name, run in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}

    def turn() -> None:
        events = {}
        for name, graph in graphs.items():
            flush.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end) / 1e3)

    _turns(turn, seconds)
    clock = clock_mhz("cuda")
    return {name: Times(tuple(taken), host[name] > statistics.median(taken), "graph replay", clock) for name, taken in samples.items()}


def clock_mhz(device: str) -> float | None:
    """The processor's clock now: of a GPU's multiprocessors, or of the fastest CPU; None where nothing tells."""
    if device == "cuda":
        if shutil.which("nvidia-smi") is None:
            return None
        query = ["nvidia-smi", f"--id={_uuid()}", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        return float(told) if told.replace(".", "").isdigit() else None
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return max((float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")), default=None)


def _uuid() -> str:
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _submission(run: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of host time that one call takes to return."""
    torch.cuda.synchronize()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return statistics.median(taken)
