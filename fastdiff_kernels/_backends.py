"""Which backend runs a call: what each refuses, in what order they are tried, how one is forced, and what `explain` says of it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from . import _choices, _loader
from ._companions import TABLE, as_tuple, one_or_all
from ._registry import Op, overload

BACKENDS = ("reference", "cpu", "triton", "cuda", "sdpa")

without_cpu_kernel: set[str] = set()
"""Ops that the compiled library does not implement."""


def missing_cpu_kernel(op: Op) -> str | None:
    if op.name in without_cpu_kernel:
        return _loader.load() or "the compiled library is older than this package; rebuild it (`fastdiff doctor` says how)"
    return None


def order(op: Op, args: Sequence[Any]) -> tuple[str, ...]:
    """The backends of a call in order of preference, before its definition."""
    device = next(a for a in args if isinstance(a, Tensor)).device
    if device.type == "cpu":
        return ("cpu",)
    kernels = tuple(name for name in op.kernels if name != "cpu")
    choice = _choice(op, device, args)
    return kernels if choice is None else (choice.backend, *(name for name in kernels if name != choice.backend))


def _choice(op: Op, device: torch.device, args: Sequence[Any]) -> _choices.Choice | None:
    if op.size is None:
        return None
    return _choices.choose(op.companion_of or op.name, _choices.device_names(device), "eager", *op.size(*args))


def refusal(op: Op, name: str, args: Sequence[Any]) -> str | None:
    """Why backend `name` does not run this call of op; None where it does."""
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    return unavailable(op, name, device) or (None if op.refuses is None else op.refuses(name, *args))


def unavailable(op: Op, name: str, device: str) -> str | None:
    """Why backend `name` runs no call of op on such a device; None where it may."""
    if name == "reference":
        return None
    if name not in op.kernels:
        return f"{op.name} has no {name} kernel"
    if name == "cpu":
        return f"the tensors are on {device}" if device != "cpu" else missing_cpu_kernel(op)
    if name == "cuda":
        if device != "cuda":
            return f"the tensors are on {device}"
        return _loader.load() or (None if has_kernel(f"fastdiff_cuda::{op.name}", "CUDA") else "the package was built without CUDA")
    if name == "sdpa":
        return None if device == "cuda" else f"the tensors are on {device}"
    if device != "cuda" and not _interpreting():
        return f"the tensors are on {device} and the Triton interpreter is off"
    return None if _triton_installed() else "triton is not installed"


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def run(op: Op, name: str, args: Sequence[Any]):
    """Runs one call of op on backend `name`, which must not refuse it."""
    if name == "reference":
        return define(op, args)
    if name == "triton":
        return getattr(importlib.import_module(f".triton.{op.family}", __package__), op.name)(*args)
    if name == "cuda":
        return getattr(torch.ops.fastdiff_cuda, op.name).default(*args)
    if name == "sdpa":
        return getattr(importlib.import_module("._sdpa", __package__), op.name)(*args)
    return overload(op).default(*args)


def define(op: Op, args: Sequence[Any]):
    """Runs op's definition in a kernel's place: its outputs have the layouts that `fake` promises, and share no memory with its inputs."""
    given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
    return one_or_all([
        found if found.stride() == promised.stride() and found.untyped_storage()._cdata not in given else promised.copy_(found)
        for found, promised in zip(as_tuple(op.reference(*args)), as_tuple(op.fake(*args)), strict=True)
    ])  # fmt: skip


def run_definition(op: Op, why: str, *args: Any):
    """Runs op's definition where no backend is asked: `why` is what `explain` says of it."""
    note(op.name, "reference", why)
    return op.reference(*args)


def note(name: str, ran: str, why: str) -> None:
    """Tells each `explain` under way that a call of op `name` runs on backend `ran`."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, _Recorder):
            mode.lines.append(f"{name}: {ran} ({why})")


class _Decided(threading.local):
    """Whether a `backend` has decided about the call under way, which those around it must not do again."""

    value = False


_decided = _Decided()


class _Uncompiled(TorchDispatchMode):
    """A mode inside which compiled functions run uncompiled.

    Dynamo compiles nothing while such a mode is on, and would remember functions called then as ones that it must never compile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stances: list[Any] = []

    def __enter__(self):
        # Dynamo may meet it while it traces; the stance cannot change then.
        self._stances.append(None if torch.compiler.is_compiling() else torch.compiler.set_stance("force_eager"))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        stance = self._stances.pop()
        if stance is not None:
            stance.__exit__(*error)


class backend(_Uncompiled):
    """Context manager in which every op runs on the named backend: "reference", "cpu", "triton", "cuda" or "sdpa" (attention alone).

    The innermost one decides. A call that the backend cannot run raises RuntimeError with the reason; nothing falls back. No backend is
    asked where a derivative or a transform has an op's definition run, which `explain` tells. Functions compiled with torch.compile run
    uncompiled inside it.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend: name must be one of {', '.join(BACKENDS)}; got {name!r}")
        super().__init__()
        self.name = name
        self.forces = f"forced by backend({name!r})"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = _by_overload().get(func)
        if op is None or _decided.value:
            return func(*args, **(kwargs or {}))
        reason = refusal(op, self.name, args)
        if reason is not None:
            raise RuntimeError(f"backend({self.name!r}) cannot run {op.name}: {reason}")
        note(op.name, self.name, self.forces)
        _decided.value = True
        try:
            return run(op, self.name, args)
        finally:
            _decided.value = False


class _Recorder(_Uncompiled):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = _by_overload().get(func)
        # What a backend further in decided it has noted itself; one further out cannot, since this mode is off while it is at work.
        if op is not None and not _decided.value:
            forced = next((mode for mode in reversed(_get_current_dispatch_mode_stack()) if isinstance(mode, backend)), None)
            self.lines.append(_preferred(op, args) if forced is None else f"{op.name}: {forced.name} ({forced.forces})")
        return func(*args, **(kwargs or {}))


def _preferred(op: Op, args: Sequence[Any]) -> str:
    """The line of `explain` for a call about which nobody but `order` and `refusal` decides."""
    reasons = {name: refusal(op, name, args) for name in BACKENDS}
    chosen = next((name for name in order(op, args) if reasons[name] is None), "reference")
    others = [f"{name}: {reason or 'not preferred here'}" for name, reason in reasons.items() if name != chosen]
    choice = _choice(op, next(a for a in args if isinstance(a, Tensor)).device, args)
    because = f" by {choice}" if choice is not None and choice.backend == chosen else ""
    return f"{op.name}: {chosen}{because} ({'; '.join(others)})"


def explain(fn: Callable, *args: Any, **kwargs: Any) -> str:
    """Runs fn(*args, **kwargs) and says, for each op in it, which backend ran and why: what the others refuse, that a `backend` forces it,
    or that a derivative or a transform has the op's definition run."""
    with _Recorder() as recorder:
        fn(*args, **kwargs)
    return "\n".join(recorder.lines) or f"{getattr(fn, '__name__', fn)}: called no fastdiff op"


@functools.cache
def _by_overload() -> dict[torch._ops.OpOverload, Op]:
    return {overload(op).default: op for op in TABLE.values()}
