"""Registers the op table with torch: kernels by device, derivatives, fake kernels, vmap; and the choice of a backend."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function as _single_level
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from . import _loader
from ._registry import OPS, Op, channels_last_aware_empty, overload

BACKENDS = ("reference", "cpu", "triton", "cuda")
_AUTOGRAD_KEYS = torch._C._after_autograd_keyset

_library = torch.library.Library("fastdiff", "DEF")
_cuda_library = torch.library.Library("fastdiff_cuda", "DEF")


def _is_tensor_argument(argument: torch._C.Argument) -> bool:
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def _backward_row(op: Op) -> Op:
    """The table's row of f_backward, made of f's: its definition is the vector-Jacobian product of f's definition."""
    inputs, outputs = op.schema[1:].split(") -> ")
    grads = [f"Tensor grad{i}" for i in range(outputs.count("Tensor"))]
    count = len(op.differentiable)
    results = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    names = [declaration.split()[-1] for declaration in inputs.split(", ")]
    wanted = [names.index(name) for name in op.differentiable]

    def reference(*args: Any) -> Tensor | tuple[Tensor, ...]:
        grad_outputs, call, needs = args[: len(grads)], args[len(grads) : -1], args[-1]
        return _vjp_below_autograd(op, wanted, grad_outputs, call, needs)

    def fake(*args: Any) -> Tensor | tuple[Tensor, ...]:
        call, needs = args[len(grads) : -1], args[-1]
        empty = channels_last_aware_empty if op.keeps_channels_last else _contiguous_empty
        empties = tuple(empty(call[i]) if need else _absent(args) for i, need in zip(wanted, needs, strict=True))
        return empties[0] if count == 1 else empties

    return Op(
        name=f"{op.name}_backward",
        family=op.family,
        schema=f"({', '.join(grads)}, {inputs}, bool[{count}] needs) -> {results}",
        reference=reference,
        fake=fake,
        kernels=op.kernels,
        backward_of=op.name,
    )


def _contiguous_empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _absent(args: Sequence[Any]) -> Tensor:
    """What stands for a gradient nobody asked for."""
    first = next(a for a in args if isinstance(a, Tensor))
    return first.new_empty(0)


def _vjp(op: Op, wanted: Sequence[int], grads: Sequence[Tensor], call: Sequence[Any], needs: Sequence[bool]):
    """Gradients of op's definition, themselves differentiable to any order."""
    chosen, of_chosen = _restrict(op, wanted, call, needs)
    with torch.enable_grad():
        pullback = torch.func.vjp(of_chosen, *[call[i] for i in chosen])[1]
        found = pullback(grads[0] if len(grads) == 1 else tuple(grads))
    return _spread(found, grads, needs)


def _vjp_below_autograd(op: Op, wanted: Sequence[int], grads: Sequence[Tensor], call: Sequence[Any], needs: Sequence[bool]):
    """The same where kernels run: there autograd is off and has to be let in again, and torch.func cannot be entered."""
    chosen, of_chosen = _restrict(op, wanted, call, needs)
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _exclude_without_autograd()):
        leaves = [call[i].detach().requires_grad_() for i in chosen]
        found = torch.autograd.grad(of_chosen(*leaves), leaves, grads)
    return _spread(found, grads, needs)


def _restrict(op: Op, wanted: Sequence[int], call: Sequence[Any], needs: Sequence[bool]) -> tuple[list[int], Callable]:
    """The indices of the arguments whose gradient is asked for, and op's definition as a function of them alone."""
    chosen = [i for i, need in zip(wanted, needs, strict=True) if need]

    def of_chosen(*tensors: Tensor):
        full = list(call)
        for i, tensor in zip(chosen, tensors, strict=True):
            full[i] = tensor
        return op.reference(*full)

    return chosen, of_chosen


def _spread(found: Sequence[Tensor], grads: Sequence[Tensor], needs: Sequence[bool]):
    """The gradients found in their places, with what stands for absence in the others."""
    remaining = iter(found)
    results = tuple(next(remaining) if need else _absent(grads) for need in needs)
    return results[0] if len(results) == 1 else results


def _exclude_without_autograd() -> torch._C.DispatchKeySet:
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    return exclude


def _forward_mode() -> bool:
    # Inside a compiled graph only the transform is visible, not the level that Python opened.
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _has_tangent(args: Sequence[Any]) -> bool:
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a, level=0).tangent is not None for a in args)


def _autograd_kernel(op: Op) -> Callable:
    """What runs at the autograd key: records the op, or hands over to its definition where only that has the derivative."""
    packet = overload(op).default
    names = op.arguments
    wanted = [names.index(name) for name in op.differentiable]
    traced = [names.index(name) for name in op.traced]
    refused = [
        (i, a.name)
        for i, a in enumerate(packet._schema.arguments)
        if _is_tensor_argument(a) and a.name not in (*op.differentiable, *op.stopped)
    ]

    def below(keyset: torch._C.DispatchKeySet, args: Sequence[Any]):
        with torch._C._AutoDispatchBelowAutograd():
            return packet.redispatch(keyset & _AUTOGRAD_KEYS, *args)

    # A plain Function refuses to run inside torch.func's transforms. Here they have already been peeled off down to one level.
    class Recorded(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, keyset, *args):
            ctx.save_for_backward(*[a for a in args if isinstance(a, Tensor)])
            ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in args]
            # Function.forward runs with both modes of differentiation off, which outer levels of torch.func would inherit.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return below(keyset, args)

        @staticmethod
        def backward(ctx, *grads):
            saved = iter(ctx.saved_tensors)
            args = [next(saved) if constant is None else constant[0] for constant in ctx.constants]
            needs = [ctx.needs_input_grad[i + 1] for i in wanted]
            found = _vjp(op, wanted, grads, args, needs) if torch.is_grad_enabled() else backward_packet(*grads, *args, needs)
            found = (found,) if isinstance(found, Tensor) else found
            result = [None] * (len(args) + 1)
            for i, need, grad in zip(wanted, needs, found, strict=True):
                result[i + 1] = grad if need else None
            return tuple(result)

    if op.differentiable:
        Recorded.__name__ = Recorded.__qualname__ = f"fastdiff_{op.name}"
        backward_packet = getattr(torch.ops.fastdiff, f"{op.name}_backward").default

    def kernel(keyset, *args):
        dual = _forward_mode() and _has_tangent(args)
        recording = torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if not (dual or recording):
            return below(keyset, args)
        if op.backward_of:
            raise RuntimeError(
                f"{op.name} has no derivative of its own; differentiate {op.backward_of}, whose derivatives exist to any order"
            )
        for i, name in refused:
            if args[i] is not None and (args[i].requires_grad or (dual and _has_tangent(args[i : i + 1]))):
                raise ValueError(f"{op.name}: {name} must not require grad or carry a tangent; {_why_refused(op)}")
        if dual or any(isinstance(args[i], Tensor) and args[i].requires_grad for i in traced):
            return op.reference(*args)
        if not any(isinstance(args[i], Tensor) and args[i].requires_grad for i in wanted):
            return below(keyset, args)
        with _single_level():
            return Recorded.apply(keyset, *args)

    return kernel


def _why_refused(op: Op) -> str:
    if op.differentiable or op.stopped:
        return "it is a constant of this op (detach it)"
    return "this op is for inference only and has no derivative (call it under torch.no_grad() or detach the argument)"


def _cpu_fallback(op: Op) -> Callable:
    def kernel(*args):
        _warn_missing()
        return op.reference(*args)

    return kernel


def _missing_cpu_kernel(op: Op) -> str | None:
    if op.name in _WITHOUT_CPU_KERNEL:
        return _loader.load() or "the compiled library is older than this package; rebuild it (`fastdiff doctor` says how)"
    return None


@functools.cache
def _warn_missing() -> None:
    reason = next(reason for op in _ROWS if (reason := _missing_cpu_kernel(op)))
    warnings.warn(f"fastdiff_kernels runs PyTorch definitions on CPU tensors: {reason}", RuntimeWarning, stacklevel=2)


def _cuda_kernel(op: Op) -> Callable:
    def kernel(*args):
        for name in (*(k for k in op.kernels if k != "cpu"), "reference"):
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
    if op.backward_of:
        # Its definition records a graph, which cannot be done below the level at which vmap runs its rules.
        torch.library.register_vmap(f"fastdiff::{op.name}", _vmap_by_slices(op), lib=_library)
    else:
        _library.impl(op.name, op.reference, "FuncTorchBatched")


def refusal(op: Op, name: str, args: Sequence[Any]) -> str | None:
    """Why backend `name` does not run this call of op; None where it does."""
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    if name == "reference":
        return None
    if name not in op.kernels:
        return f"{op.name} has no {name} kernel"
    if name == "cpu":
        return f"the tensors are on {device}" if device != "cpu" else _missing_cpu_kernel(op)
    if name == "cuda":
        if device != "cuda":
            return f"the tensors are on {device}"
        return _loader.load() or (None if _has_kernel(f"fastdiff_cuda::{op.name}", "CUDA") else "the package was built without CUDA")
    if device != "cuda" and not _interpreting():
        return f"the tensors are on {device} and the Triton interpreter is off"
    if not _triton_installed():
        return "triton is not installed"
    return None


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def run(op: Op, name: str, args: Sequence[Any]):
    """Runs one call of op on backend `name`, which must not refuse it."""
    if name == "reference":
        return op.reference(*args)
    if name == "triton":
        return getattr(importlib.import_module(f".triton.{op.family}", __package__), op.name)(*args)
    if name == "cuda":
        return getattr(torch.ops.fastdiff_cuda, op.name).default(*args)
    return overload(op).default(*args)


class backend(TorchDispatchMode):
    """Context manager in which every op runs on the named backend: "reference", "cpu", "triton" or "cuda".

    A call that the backend cannot run raises RuntimeError with the reason; nothing falls back. Functions compiled with
    torch.compile run uncompiled inside it.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend: name must be one of {', '.join(BACKENDS)}; got {name!r}")
        super().__init__()
        self.name = name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = _BY_OVERLOAD.get(func)
        if op is None:
            return func(*args, **(kwargs or {}))
        reason = refusal(op, self.name, args)
        if reason is not None:
            raise RuntimeError(f"backend({self.name!r}) cannot run {op.name}: {reason}")
        return run(op, self.name, args)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Op, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (op := _BY_OVERLOAD.get(func)) is not None:
            self.calls.append((op, args))
        return func(*args, **(kwargs or {}))


def explain(fn: Callable, *args: Any, **kwargs: Any) -> str:
    """Runs fn(*args, **kwargs) and says, for each op in it, which backend ran and why the others did not."""
    with _Recorder() as recorder:
        fn(*args, **kwargs)
    if not recorder.calls:
        return f"{getattr(fn, '__name__', fn)}: called no fastdiff op (under forward-mode derivatives the definitions run)"
    lines = []
    for op, call in recorder.calls:
        order = ("cpu",) if next(a for a in call if isinstance(a, Tensor)).device.type == "cpu" else op.kernels
        reasons = {name: refusal(op, name, call) for name in BACKENDS}
        chosen = next((name for name in order if reasons.get(name) is None and name in op.kernels), "reference")
        others = [f"{name}: {reason or 'not preferred here'}" for name, reason in reasons.items() if name != chosen]
        lines.append(f"{op.name}: {chosen} ({'; '.join(others)})")
    return "\n".join(lines)


def _register(op: Op) -> None:
    _library.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    if "cuda" in op.kernels:
        _cuda_library.define(f"{op.name}{op.schema}")


def _implement(op: Op) -> None:
    name = f"fastdiff::{op.name}"
    if not _has_kernel(name, "CPU"):
        _WITHOUT_CPU_KERNEL.add(op.name)
        _library.impl(op.name, _cpu_fallback(op), "CPU")
    _library.impl(op.name, _cuda_kernel(op), "CUDA")
    _library.impl(op.name, _autograd_kernel(op), "Autograd", with_keyset=True)
    torch.library.register_fake(name, op.fake, lib=_library)
    _implement_vmap(op)


_WITHOUT_CPU_KERNEL: set[str] = set()
_ROWS = [*OPS.values(), *(_backward_row(op) for op in OPS.values() if op.differentiable)]
for _op in _ROWS:
    _register(_op)
_loader.load()
for _op in _ROWS:
    _implement(_op)
_BY_OVERLOAD = {overload(op).default: op for op in _ROWS}
TABLE: dict[str, Op] = {op.name: op for op in _ROWS}
