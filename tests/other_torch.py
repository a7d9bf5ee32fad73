"""Run by check_other_torch.sh inside another environment: every CPU kernel of the library loads there and equals its definition."""

from __future__ import annotations

import importlib
import sys

import torch

import fastdiff_kernels
from fastdiff_kernels import _backends, _loader
from fastdiff_kernels._registry import OPS, overload


def main() -> None:
    assert _loader.load() is None, _loader.load()
    samples = {}
    for family in sorted({op.family for op in OPS.values()}):
        samples |= importlib.import_module(f"tests.samples.{family}").SAMPLES
    compared = 0
    for name, op in OPS.items():
        assert name not in _backends.without_cpu_kernel, f"{name} has no CPU kernel in {_loader.LIBRARY}"
        for args in samples[name](torch.float64, "cpu"):
            call = overload(op).default
            actual = call(*args)
            with fastdiff_kernels.backend("reference"):
                expected = call(*args)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
            compared += 1
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {compared} calls of {len(OPS)} ops equal their definitions")


if __name__ == "__main__":
    main()
