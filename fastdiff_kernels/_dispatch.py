"""Registers the op table with torch: kernels by device, derivatives, fake kernels and vmap."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import _loader
from ._backends import define, has_kernel, missing_cpu_kernel, order, refusal, run, run_definition, without_cpu_kernel
from ._companions import TABLE
from ._derivatives import autograd_kernel, without_derivative
from ._registry import Op, overload

_library = torch.library.Library("fastdiff", "DEF")
_cuda_library = torch.library.Library("fastdiff_cuda", "DEF")


def _cpu_fallback(op: Op) -> Callable:
    def kernel(*args):
        _warn_missing()
        return define(op, args)

    return kernel


@functools.cache
def _warn_missing() -> None:
    reason = next(reason for op in TABLE.values() if (reason := missing_cpu_kernel(op)))
    warnings.warn(f"fastdiff_kernels runs PyTorch definitions on CPU tensors: {reason}", RuntimeWarning, stacklevel=2)


def _cuda_kernel(op: Op) -> Callable:
    def kernel(*args):
        for name in (*order(op, args), "reference"):
            if refusal(op, name, args) is None:
                return run(op, name, args)
        raise AssertionError("the definition refuses nothing")

    return kernel


def _vmap_by_slices(op: Op) -> Callable:
    packet = overload(op).default

    def rule(info, in_dims, *args):
        slices = [
            packet(*[a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)]) for i in range(info.batch_size)
        ]
        if isinstance(slices[0], Tensor):
            return torch.stack(slices), 0
        return tuple(torch.stack(s) for s in zip(*slices, strict=True)), (0,) * len(slices[0])

    return rule


def _implement_vmap(op: Op) -> None:
    if op.companion_of:
        # Its definition records a graph, which cannot be done below the level at which vmap runs its rules.
        torch.library.register_vmap(f"fastdiff::{op.name}", _vmap_by_slices(op), lib=_library)
    else:
        _library.impl(op.name, functools.partial(run_definition, op, "vmap runs its definition"), "FuncTorchBatched")


def _register(op: Op) -> None:
    _library.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    if "cuda" in op.kernels:
        _cuda_library.define(f"{op.name}{op.schema}")


def _implement(op: Op) -> None:
    name = f"fastdiff::{op.name}"
    if not has_kernel(name, "CPU"):
        without_cpu_kernel.add(op.name)
        _library.impl(op.name, _cpu_fallback(op), "CPU")
    _library.impl(op.name, _cuda_kernel(op), "CUDA")
    _library.impl(op.name, autograd_kernel(op), "Autograd", with_keyset=True)
    torch.library.register_fake(name, op.fake, lib=_library)
    _implement_vmap(op)


for _op in TABLE.values():
    _register(_op)
_loader.load()
for _op in TABLE.values():
    _implement(_op)


def bind(name: str) -> Callable:
    """The op as public functions call it: where no derivative is asked for, past the Python that would find that out again."""
    return without_derivative(overload(TABLE[name]).default)
