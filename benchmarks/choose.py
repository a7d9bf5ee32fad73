"""Which backend runs a call, and whether a compiled call is left to the compiler: measures it and writes the rows of choices.csv.

On a GPU an eager call is timed on each backend that has a kernel for it. A compiled call, on any device, is timed with the op and with its
definition for the compiler to fuse. What stands around these ops in a block are matrix products and convolutions, with which neither form
is fused. On a CPU it is the process's time that counts, on one thread, so that other processes disturb less.

A backend is chosen by its time for forward and backward together, and for compiled calls without gradients by that of forward alone; over
all sizes measured, or apart on two sides of one number of rows or one width, where that saves time.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import device_name
from benchmarks.timing import LEAST_SAMPLES, Times, interleave, keep_freed_memory
from fastdiff_kernels import _choices, backend
from fastdiff_kernels._registry import OPS
from fastdiff_kernels.nn import axial_rope
from fastdiff_kernels.nn._policy import apply, form

POINTS = Path(__file__).parents[1] / "out" / "tune" / "points.jsonl"


@dataclass(frozen=True)
class Call:
    """One op as a block calls it."""

    op: str
    tensors: Callable[[], list[Tensor]]
    options: dict[str, Any]
    constants: tuple[Any, ...] = ()
    """Stand behind the first tensor."""

    def run(self, policy: str, *tensors: Tensor) -> Any:
        first, *rest = tensors
        return apply(policy, self.op, first, *self.constants, *rest, **self.options)


def modulated(op: str, shape: tuple[int, int, int], activations: int, modulations: int) -> Call:
    def tensors() -> list[Tensor]:
        chunks = torch.randn(shape[0], 6 * shape[2]).chunk(6, dim=1)
        return [*(torch.randn(shape) for _ in range(activations)), *chunks[:modulations]]

    return Call(op, tensors, {})


def packed(op: str, shape: tuple[int, int, int, int], parts: int) -> Call:
    batch, tokens, heads, width = shape
    return Call(op, lambda: list(torch.randn(batch, tokens, 3, heads, width).unbind(2)[:parts]), {})


def normalised(shape: tuple[int, int, int, int], rope: str | None = None) -> Call:
    """Queries and keys with the weights of their norm; angles are options, since no block wants their gradients."""
    plain = packed("qk_norm_rope", shape, 2)
    options: dict[str, Any] = {"norm": "rms"}
    if rope is not None:
        side = math.isqrt(shape[1])
        options |= {**dict(zip(("cos", "sin"), axial_rope(side, side, shape[3]), strict=True)), "rope": rope}
    return Call(plain.op, lambda: [*plain.tensors(), torch.ones(shape[3]), torch.ones(shape[3])], options)


def at_once(op: str, shape: tuple[int, ...]) -> Call:
    """One projection as it is."""
    return Call(op, lambda: [torch.randn(shape)], {})


def rms_modulated(shape: tuple[int, int, int]) -> Call:
    plain = modulated("rms_norm_modulate", shape, 1, 2)

    def tensors() -> list[Tensor]:
        x, *modulation = plain.tensors()
        return [x, torch.ones(shape[2]), *modulation]

    return Call("rms_norm_modulate", tensors, {})


def grouped(shape: tuple[int, ...], modulated: bool, **options: Any) -> Call:
    def tensors() -> list[Tensor]:
        channels = torch.ones(shape[1]), torch.zeros(shape[1])
        return [torch.randn(shape), *channels, *(torch.randn(shape[0], 2 * shape[1]).chunk(2, dim=1) if modulated else ())]

    return Call("group_norm_silu", tensors, options, (32,))


TOKENS = ((4, 256, 1152), (1, 1024, 1152), (4, 256, 384), (8, 64, 128))
HEADS = ((4, 256, 16, 72), (1, 1024, 16, 72), (16, 256, 9, 64), (16, 64, 12, 64), (16, 256, 1, 256))
MAPS = ((16, 256, 16, 16), (4, 384, 32, 32), (16, 64, 8, 8))
CALLS = [
    *(modulated("layer_norm_modulate", shape, 1, 2) for shape in TOKENS),
    *(rms_modulated(shape) for shape in TOKENS),
    *(modulated("gate_residual", shape, 2, 1) for shape in TOKENS),
    *(modulated("gate_residual_norm_modulate", shape, 2, 3) for shape in TOKENS),
    *(normalised(shape) for shape in HEADS[:3]),
    *(normalised(shape, rope) for shape in HEADS[:3] for rope in ("interleaved", "half")),
    *(at_once("pixel_norm", (shape[0], shape[1], 3 * shape[2], shape[3])) for shape in HEADS[2:4]),
    *(packed("attention", shape, 3) for shape in HEADS),
    *(at_once("attention_packed", (shape[0], shape[1], 3, *shape[2:])) for shape in HEADS),
    *(grouped(shape, modulated=True) for shape in MAPS),
    *(grouped(shape, modulated=False, activation=None) for shape in MAPS),
]


@dataclass(frozen=True)
class Point:
    """What one call at one size took by each backend, in seconds."""

    op: str
    mode: str
    rows: int
    width: int
    forward: dict[str, float]
    both: dict[str, float]

    @property
    def decisive(self) -> dict[str, float]:
        return self.forward if self.mode == "compiled_inference" else self.both


def measure(call: Call, mode: str, device: str, seconds: float) -> Point:
    """Times one call in one mode, "eager" or "compiled", by every backend that runs it."""
    torch._dynamo.reset()
    call = replace(call, options={name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.options.items()})
    # What a GPU computes networks in.
    tensors = [t.to(device, torch.bfloat16 if device == "cuda" else None) for t in call.tensors()]
    first, *rest = tensors
    args = (first, *call.constants, *rest)
    fns = _compiled(call) if mode == "compiled" else _eager(call, tensors)
    times = []
    for backward in (False, True):
        runs = {name: bind(fn, [t.detach().requires_grad_(backward) for t in tensors]) for name, fn in fns.items()}
        taken = interleave(runs, seconds, device) if device == "cuda" else by_process_time(runs, seconds)
        times.append({name: t.median for name, t in taken.items()})
    rows, width = OPS[call.op].size(*args)  # type: ignore[misc]
    return Point(form(call.op, *args, **call.options) if mode == "compiled" else call.op, mode, rows, width, *times)


def _compiled(call: Call) -> dict[str, Callable]:
    policies = {"fastdiff": "always", "inductor": "never"}
    return {name: torch.compile(lambda *t, p=policy: call.run(p, *t), dynamic=False) for name, policy in policies.items()}


def _eager(call: Call, tensors: list[Tensor]) -> dict[str, Callable]:
    """The backends that run forward and backward; what one refuses, as SDPA some dtypes, it is no choice for."""

    def on(name: str) -> Callable:
        def run(*given: Tensor) -> Any:
            with backend(name):
                return call.run("always", *given)

        return run

    fns = {name: on(name) for name in OPS[call.op].kernels if name != "cpu"}
    found = {}
    for name, fn in fns.items():
        try:
            bind(fn, [t.detach().requires_grad_() for t in tensors])()
        except RuntimeError as error:
            if not str(error).startswith("backend("):
                raise
        else:
            found[name] = fn
    return found


def choices(points: list[Point], device: str, where: str) -> list[dict[str, str]]:
    """Rows of choices.csv for the points of one op in one mode."""
    sides = min(_splits(points), key=lambda split: split[0])[1]
    return [_row(side, low, high, dimension, device, where) for side, dimension, low, high in sides]


def _splits(points: list[Point]) -> Iterator[tuple[float, list[tuple[list[Point], str, str, str]]]]:
    """Ways to part the points, the whole first, each with the sum of the logarithms of the times that its choices take."""
    yield _loss(points), [(points, "width", "", "")]
    for dimension in ("width", "rows"):
        values = sorted({getattr(p, dimension) for p in points})
        for last in values[:-1]:
            low, high = ([p for p in points if (getattr(p, dimension) <= last) == below] for below in (True, False))
            # A row more has to save something worth its reading.
            loss = _loss(low) + _loss(high) + 0.02
            yield loss, [(low, dimension, "", str(last)), (high, dimension, str(last + 1), "")]


def _loss(points: list[Point]) -> float:
    return sum(math.log(p.decisive[_best(points)]) for p in points)


def _best(points: list[Point]) -> str:
    """The backend that takes the least time over all points, of those that run them all."""
    common = set.intersection(*({*p.decisive} for p in points))
    return min(sorted(common), key=lambda name: sum(math.log(p.decisive[name]) for p in points))


def _row(points: list[Point], low: str, high: str, dimension: str, device: str, where: str) -> dict[str, str]:
    best = _best(points)
    sizes = " and ".join(f"{p.rows}x{p.width}" for p in points)
    gains = [_gains([getattr(p, direction) for p in points], best) for direction in ("forward", "both")]
    evidence = f"{best} {gains[0]} of the next forward and {gains[1]} both ways at {sizes}; {where}; benchmarks/choose.py"
    bounds = {"min_rows": "", "max_rows": "", "min_width": "", "max_width": ""} | {f"min_{dimension}": low, f"max_{dimension}": high}
    return {"op": points[0].op, "device": device, "mode": points[0].mode, **bounds, "backend": best, "evidence": evidence}


def _gains(times: list[dict[str, float]], best: str) -> str:
    others = [min((t for name, t in at.items() if name != best), default=at[best]) / at[best] for at in times]
    return f"{min(others):.2f}x to {max(others):.2f}x" if len(others) > 1 else f"{others[0]:.2f}x"


def replaced(table: list[dict[str, str]], rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The table with these rows for those of their ops on their device in their mode; a GPU's own stand before those of all GPUs."""
    keys = {(r["op"], r["device"], r["mode"]) for r in rows}
    kept = [r for r in table if (r["op"], r["device"], r["mode"]) not in keys]
    return [*rows, *kept]


def update(path: Path, deadline: float, points: Path = POINTS, seconds: float = 2.0, calls: Sequence[Call] | None = None) -> int:
    """Measures until the deadline (of time.monotonic), and rewrites the table at `path` when all is measured; returns what is left.

    points: where measurements are kept until then.
    """
    gpu = torch.cuda.is_available()
    device, name = ("cuda", _choices.device_names(torch.device("cuda", 0))[0]) if gpu else ("cpu", "cpu")
    where = f"{device_name(device)}; torch {torch.__version__}" + ("" if gpu else "; one thread, freed memory kept")
    todo = [(call, mode) for mode in (("eager", "compiled") if gpu else ("compiled",)) for call in (CALLS if calls is None else calls)]
    done = [Point(**json.loads(line)) for line in points.read_text().splitlines()] if points.exists() else []
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if not gpu else threads)
    try:
        for i, (call, mode) in enumerate(todo[len(done) :], start=len(done)):
            if time.monotonic() > deadline:
                return len(todo) - len(done)
            point = measure(call, mode, device, seconds)
            points.parent.mkdir(parents=True, exist_ok=True)
            with points.open("a") as file:
                file.write(json.dumps(asdict(point)) + "\n")
            done.append(point)
            took = ", ".join(f"{backend} {1e3 * t:.3g} ms" for backend, t in point.both.items())
            print(f"[{i + 1}/{len(todo)}] {point.op} {mode} {point.rows}x{point.width} both ways: {took}", flush=True)
    finally:
        torch.set_num_threads(threads)
    families: dict[tuple[str, str], list[Point]] = {}
    for point in done:
        for mode in (point.mode, "compiled_inference") if point.mode == "compiled" else (point.mode,):
            families.setdefault((point.op, mode), []).append(replace(point, mode=mode))
    rows = [row for family in families.values() for row in choices(family, name, where)]
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(replaced(table, rows))
    points.unlink()
    print(f"{path}: {len(rows)} rows for {name}")
    return 0


def by_process_time(runs: dict[str, Callable], seconds: float) -> dict[str, Times]:
    keep_freed_memory()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    deadline = time.process_time() + seconds
    while time.process_time() < deadline or len(next(iter(samples.values()))) < LEAST_SAMPLES:
        for name, run in runs.items():
            start = time.process_time()
            run()
            samples[name].append(time.process_time() - start)
    return {name: Times(tuple(values)) for name, values in samples.items()}


def bind(fn: Callable, leaves: list[Tensor]) -> Callable[[], object]:
    def forward() -> Any:
        return fn(*leaves)

    def both() -> Any:
        outputs = fn(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return torch.autograd.grad(outputs, leaves, upstream)

    if not leaves[0].requires_grad:
        return forward
    outputs = fn(*leaves)
    upstream = [torch.randn_like(o) for o in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
    return both
