"""Run by check_other_torch.sh inside another environment: every CPU kernel of the library loads there and equals its definition."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastdiff_kernels
from fastdiff_kernels import _backends, _loader, _scale
from fastdiff_kernels._companions import TABLE
from fastdiff_kernels._registry import OPS, Op, overload

from .helpers import outputs_of


def calls(op: Op, args: tuple) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The call of op and those of its companions that such a call leads to, for every gradient that kernels compute."""
    yield op.name, args
    needs = [name not in op.traced and isinstance(args[op.arguments.index(name)], Tensor) for name in op.differentiable]
    if f"{op.name}_backward" in TABLE:
        outputs = outputs_of(overload(op).default(*args))
        yield f"{op.name}_backward", (*(outputs[i].cos() for i in op.primary), *args, *(outputs[i] for i in op.saved), needs)
    if op.recorded:
        yield f"{op.name}_recorded", (*args, needs)


def compare(name: str, args: tuple) -> None:
    """Runs one call of an op by its kernel and by its definition."""
    call = overload(TABLE[name]).default
    found = call(*args)
    with fastdiff_kernels.backend("reference"):
        expected = call(*args)
    # The seeded normals are float32 values, equal to 2 ulp.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}")


def compare_scaling() -> None:
    """The one kernel that is no row of the table."""
    gradient, factor = torch.randn(3, 7), torch.tensor([0.5, 1.0, -2.0])
    expected = gradient * factor[:, None]
    torch.ops.fastdiff.scale_samples_.default(gradient, factor)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def main() -> None:
    assert _loader.load() is None, _loader.load()
    missing = [name for name in TABLE if name in _backends.without_cpu_kernel]
    assert not missing, f"without a CPU kernel in {_loader.LIBRARY}: {', '.join(missing)}"
    assert _scale._compiled(), f"{_loader.LIBRARY} has no scale_samples_"
    samples = {}
    for family in sorted({op.family for op in OPS.values()}):
        samples |= importlib.import_module(f"tests.samples.{family}").SAMPLES
    compared = [call for op in OPS.values() for args in samples[op.name](torch.float64, "cpu") for call in calls(op, args)]
    for name, args in compared:
        compare(name, args)
    assert {name for name, _ in compared} == set(TABLE)
    compare_scaling()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {len(compared)} calls of {len(TABLE)} ops equal their definitions")


if __name__ == "__main__":
    main()
