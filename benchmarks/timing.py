"""Times variants turn by turn, so that drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LEAST_SAMPLES = 5
# More than the last cache of any GPU supported; it is written between two runs, so that neither finds its inputs there.
FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Times:
    """What one variant took."""

    seconds: tuple[float, ...]
    launch_bound: bool = False
    """Whether the host took longer to submit the work than the device to do it; `seconds` are then the device's alone."""

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(variants: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, Times]:
    """Runs every variant once per turn, for that many seconds in all and a few turns at least."""
    return _on_gpu(variants, seconds) if device == "cuda" else _on_cpu(variants, seconds)


def _on_cpu(variants: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(next(iter(samples.values()))) < LEAST_SAMPLES:
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: Times(tuple(values)) for name, values in samples.items()}


def _on_gpu(variants: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    """Each variant is captured once as a CUDA graph and replayed with cold caches, timed by events."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    graphs = {name: _capture(run) for name, run in variants.items()}
    host = {name: _submission(run) for name, run in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(next(iter(samples.values()))) < LEAST_SAMPLES:
        events = {}
        for name, graph in graphs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events[name] = start, end
        torch.cuda.synchronize()
        for name, (start, end) in events.items():
            samples[name].append(start.elapsed_time(end) / 1e3)
    return {name: Times(tuple(values), host[name] > statistics.median(values)) for name, values in samples.items()}


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
