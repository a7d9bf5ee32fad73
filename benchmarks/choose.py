"""Measures, for the table of choices, whether a compiled call is faster with an op or with its definition for the compiler to fuse.

    python -m benchmarks.choose [--seconds 2] [--op attention]

prints one line of CSV for each op of the blocks and each size: where the definition is faster in forward and backward together, the backend
is "inductor". What stands around these ops in a block are matrix products and convolutions, with which neither form is fused. On a CPU it
is the process's time that counts, on one thread, so that other processes disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import device_name
from benchmarks.timing import LEAST_SAMPLES, Times, interleave
from fastdiff_kernels._registry import OPS
from fastdiff_kernels.nn._policy import apply


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


def packed(op: str, shape: tuple[int, int, int, int], parts: int, **options: Any) -> Call:
    batch, tokens, heads, width = shape
    return Call(op, lambda: list(torch.randn(batch, tokens, 3, heads, width).unbind(2)[:parts]), options)


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
    *(modulated("gate_residual", shape, 2, 1) for shape in TOKENS),
    *(modulated("gate_residual_norm_modulate", shape, 2, 3) for shape in TOKENS),
    *(packed("qk_norm_rope", shape, 2, norm="rms") for shape in HEADS[:3]),
    *(packed("qkv_pixel_norm", shape, 3) for shape in HEADS[2:4]),
    *(packed("attention", shape, 3) for shape in HEADS),
    *(grouped(shape, modulated=True) for shape in MAPS),
    *(grouped(shape, modulated=False, activation=None) for shape in MAPS),
]


def measure(call: Call, device: str, seconds: float) -> tuple[tuple[int, int], dict[str, float]]:
    """The size, and the time of the definition over that of the op by mode."""
    torch._dynamo.reset()
    tensors = [t.to(device) for t in call.tensors()]
    fns = {policy: torch.compile(lambda *t, p=policy: call.run(p, *t), dynamic=False) for policy in ("always", "never")}
    ratios = {}
    for mode in ("forward", "fwd+bwd"):
        leaves = [t.detach().requires_grad_(mode != "forward") for t in tensors]
        runs = {policy: bind(fn, leaves) for policy, fn in fns.items()}
        times = interleave(runs, seconds, device) if device == "cuda" else by_process_time(runs, seconds)
        ratios[mode] = times["never"].median / times["always"].median
    first, *rest = tensors
    return OPS[call.op].size(first, *call.constants, *rest), ratios


def by_process_time(runs: dict[str, Callable], seconds: float) -> dict[str, Times]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    deadline = time.process_time() + seconds
    while time.process_time() < deadline or len(samples["always"]) < LEAST_SAMPLES:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each call and mode")
    parser.add_argument("--op", help="this op alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = f"{device_name(device)}; torch {torch.__version__}"
    for call in CALLS:
        if arguments.op in (None, call.op):
            (rows, width), ratios = measure(call, device, arguments.seconds)
            backend = "inductor" if ratios["fwd+bwd"] < 1 else "fastdiff"
            evidence = f"op {ratios['forward']:.2f}x forward and {ratios['fwd+bwd']:.2f}x both ways; {where}"
            print(f"{call.op},{device},compiled,{rows},{rows},{width},{width},{backend},{evidence}", flush=True)


if __name__ == "__main__":
    main()
