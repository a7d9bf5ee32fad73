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

from . import _choices, _loader
from ._registry import OPS, Op, channels_last_aware_empty, overload

BACKENDS = ("reference", "cpu", "triton", "cuda", "sdpa")
_AUTOGRAD_KEYS = torch._C._after_autograd_keyset

_library = torch.library.Library("fastdiff", "DEF")
_cuda_library = torch.library.Library("fastdiff_cuda", "DEF")


def _is_tensor_argument(argument: torch._C.Argument) -> bool:
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def _inputs(op: Op) -> str:
    return op.schema[1:].split(") -> ")[0]


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _one_or_all(tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _all(tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def _places(op: Op) -> list[int]:
    """Where among f's arguments the differentiable ones stand."""
    names = [declaration.split()[-1] for declaration in _inputs(op).split(", ")]
    return [names.index(name) for name in op.differentiable]


def _backward_row(op: Op) -> Op:
    """The table's row of f_backward, made of f's: its definition is the vector-Jacobian product of f's definition."""
    wanted, inputs = _places(op), _inputs(op)
    grads, count = len(op.primary), len(inputs.split(", "))
    kind = "Tensor?" if op.optional_grads else "Tensor"
    saved = len(op.differentiable) if op.recorded else len(op.saved)
    declared = [*(f"{kind} grad{i}" for i in op.primary), inputs, *(f"Tensor saved{i}" for i in range(saved)), f"bool[{len(wanted)}] needs"]

    def call(args: Sequence[Any]) -> Sequence[Any]:
        return args[grads : grads + count]

    def reference(*args: Any) -> Tensor | tuple[Tensor, ...]:
        return _vjp_below_autograd(op, wanted, args[:grads], call(args), args[-1])

    def fake(*args: Any) -> Tensor | tuple[Tensor, ...]:
        empty = channels_last_aware_empty if op.keeps_channels_last else _contiguous_empty
        return _one_or_all([empty(call(args)[i]) if need else _absent(args) for i, need in zip(wanted, args[-1], strict=True)])

    size, refuses = _about_call(op, call)
    return Op(
        name=f"{op.name}_backward",
        family=op.family,
        schema=f"({', '.join(declared)}) -> {_returns(len(wanted))}",
        reference=reference,
        fake=fake,
        kernels=op.kernels,
        size=size,
        refuses=refuses,
        backward_of=op.name,
    )


def _about_call(op: Op, call: Callable[[Sequence[Any]], Sequence[Any]]) -> tuple[Callable | None, Callable | None]:
    """op's `size` and `refuses` for a companion, among whose arguments `call` finds op's."""
    size, refuses = op.size, op.refuses
    return (
        None if size is None else lambda *args: size(*call(args)),
        None if refuses is None else lambda name, *args: refuses(name, *call(args)),
    )


def _recorded_row(op: Op) -> Op:
    """The table's row of f_recorded: f's outputs, and the gradients of their sum."""
    wanted = _places(op)

    def reference(*args: Any) -> tuple[Tensor, ...]:
        outputs = _all(op.reference(*args[:-1]))
        ones = [torch.ones_like(o) for o in outputs]
        return (*outputs, *_all(_vjp_below_autograd(op, wanted, ones, args[:-1], args[-1])))

    def fake(*args: Any) -> tuple[Tensor, ...]:
        gradients = [_contiguous_empty(args[i]) if need else _absent(args) for i, need in zip(wanted, args[-1], strict=True)]
        return (*_all(op.fake(*args[:-1])), *gradients)

    size, refuses = _about_call(op, lambda args: args[:-1])
    return Op(
        name=f"{op.name}_recorded",
        family=op.family,
        schema=f"({_inputs(op)}, bool[{len(wanted)}] needs) -> {_returns(op.outputs + len(wanted))}",
        reference=reference,
        fake=fake,
        kernels=op.kernels,
        size=size,
        refuses=refuses,
        backward_of=op.name,
    )


def _contiguous_empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _absent(args: Sequence[Any]) -> Tensor:
    """What stands for a gradient nobody asked for."""
    first = next(a for a in args if isinstance(a, Tensor))
    return first.new_empty(0)


def _vjp(op: Op, wanted: Sequence[int], grads: Sequence[Tensor | None], call: Sequence[Any], needs: Sequence[bool]):
    """Gradients of op's definition, themselves differentiable to any order."""
    chosen, of_chosen = _restrict(op, wanted, call, needs)
    with torch.enable_grad():
        outputs, pullback = torch.func.vjp(of_chosen, *[call[i] for i in chosen])[:2]
        found = pullback(tuple(torch.zeros_like(o) if grad is None else grad for o, grad in zip(outputs, grads, strict=True)))
    return _spread(found, call, needs)


def _vjp_below_autograd(op: Op, wanted: Sequence[int], grads: Sequence[Tensor | None], call: Sequence[Any], needs: Sequence[bool]):
    """The same where kernels run: there autograd is off and has to be let in again, and torch.func cannot be entered."""
    chosen, of_chosen = _restrict(op, wanted, call, needs)
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _exclude_without_autograd()):
        leaves = [call[i].detach().requires_grad_() for i in chosen]
        used = [(o, grad) for o, grad in zip(of_chosen(*leaves), grads, strict=True) if grad is not None]
        found = torch.autograd.grad([o for o, _ in used], leaves, [grad for _, grad in used], materialize_grads=True)
    return _spread(found, call, needs)


def _restrict(op: Op, wanted: Sequence[int], call: Sequence[Any], needs: Sequence[bool]) -> tuple[list[int], Callable]:
    """The indices of the arguments whose gradient is asked for, and op's definition as a function of them to what has a derivative."""
    chosen = [i for i, need in zip(wanted, needs, strict=True) if need]

    def of_chosen(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(call)
        for i, tensor in zip(chosen, tensors, strict=True):
            full[i] = tensor
        outputs = _all(op.reference(*full))
        return tuple(outputs[i] for i in op.primary)

    return chosen, of_chosen


def _spread(found: Sequence[Tensor], call: Sequence[Any], needs: Sequence[bool]):
    """The gradients found in their places, with what stands for absence in the others."""
    remaining = iter(found)
    return _one_or_all([next(remaining) if need else _absent(call) for need in needs])


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


def _dual(op: Op, dual: str, wanted: Sequence[int], args: Sequence[Any]):
    """Outputs and tangents of one call in forward mode, by the op named `dual`, which computes both."""
    pairs = [forward_ad.unpack_dual(a, level=0) if isinstance(a, Tensor) else (a, None) for a in args]
    results = getattr(torch.ops.fastdiff, dual).default(*[primal for primal, _ in pairs], *[pairs[i][1] for i in wanted])
    outputs, tangents = results[: op.outputs], results[op.outputs :]
    return _one_or_all([forward_ad.make_dual(o, t, level=0) for o, t in zip(outputs, tangents, strict=True)])


def _recording(op: Op, wanted: Sequence[int]) -> type[torch.autograd.function._SingleLevelFunction]:
    """The autograd function of op."""
    backward_packet = getattr(torch.ops.fastdiff, f"{op.name}_backward").default
    forward_packet = getattr(torch.ops.fastdiff, f"{op.name}_recorded" if op.recorded else op.name).default
    passed = [name in op.passes_through for name in op.differentiable]

    # A plain Function refuses to run inside torch.func's transforms. Here they have already been peeled off down to one level.
    class Recorded(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, keyset, *args):
            given = (*args, [ctx.needs_input_grad[i + 1] for i in wanted]) if op.recorded else args
            # Function.forward runs with both modes of differentiation off, which outer levels of torch.func would inherit.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                results = _all(forward_packet.redispatch(keyset & _AUTOGRAD_KEYS, *given))
            outputs = results[: op.outputs]
            saved = results[op.outputs :] if op.recorded else [outputs[i] for i in op.saved]
            ctx.save_for_backward(*[a for a in args if isinstance(a, Tensor)], *saved)
            ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in args]
            ctx.mark_non_differentiable(*[outputs[i] for i in op.auxiliary])
            ctx.set_materialize_grads(not op.optional_grads)
            return _one_or_all(outputs)

        @staticmethod
        def backward(ctx, *grads):
            grads = [grads[i] for i in op.primary]
            tensors = iter(ctx.saved_tensors)
            args = [next(tensors) if constant is None else constant[0] for constant in ctx.constants]
            asked = [ctx.needs_input_grad[i + 1] for i in wanted]
            needs = [a and not p for a, p in zip(asked, passed, strict=True)]
            if not any(needs):
                found = [None] * len(wanted)
            elif torch.is_grad_enabled():
                found = _all(_vjp(op, wanted, grads, args, needs))
            else:
                found = _all(backward_packet(*grads, *args, *tensors, needs))
            result = [None] * (len(args) + 1)
            for i, need, by_kernel, grad in zip(wanted, asked, needs, found, strict=True):
                result[i + 1] = (grad if by_kernel else grads[0]) if need else None
            return tuple(result)

    Recorded.__name__ = Recorded.__qualname__ = f"fastdiff_{op.name}"
    return Recorded


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
    recorded = _recording(op, wanted) if _has_backward(op) else None

    def below(keyset: torch._C.DispatchKeySet, args: Sequence[Any]):
        with torch._C._AutoDispatchBelowAutograd():
            return packet.redispatch(keyset & _AUTOGRAD_KEYS, *args)

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
        if dual and op.dual:
            return _dual(op, op.dual, wanted, args)
        if dual or any(isinstance(args[i], Tensor) and args[i].requires_grad for i in traced):
            return op.reference(*args)
        if not any(isinstance(args[i], Tensor) and args[i].requires_grad for i in wanted):
            return below(keyset, args)
        with _single_level():
            return recorded.apply(keyset, *args)

    return kernel


def _has_backward(op: Op) -> bool:
    """Whether some argument's gradient is computed by kernels."""
    return set(op.differentiable) > set(op.traced)


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
        for name in (*_order(op, args), "reference"):
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


def _order(op: Op, args: Sequence[Any]) -> tuple[str, ...]:
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
    return _choices.choose(op.backward_of or op.name, _choices.device_names(device), "eager", *op.size(*args))


def refusal(op: Op, name: str, args: Sequence[Any]) -> str | None:
    """Why backend `name` does not run this call of op; None where it does."""
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    if name == "reference":
        return None
    if name not in op.kernels:
        return f"{op.name} has no {name} kernel"
    if op.refuses is not None and (reason := op.refuses(name, *args)) is not None:
        return reason
    if name == "cpu":
        return f"the tensors are on {device}" if device != "cpu" else _missing_cpu_kernel(op)
    if name == "cuda":
        if device != "cuda":
            return f"the tensors are on {device}"
        return _loader.load() or (None if _has_kernel(f"fastdiff_cuda::{op.name}", "CUDA") else "the package was built without CUDA")
    if name == "sdpa":
        return None if device == "cuda" else f"the tensors are on {device}"
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
    if name == "sdpa":
        return getattr(importlib.import_module("._sdpa", __package__), op.name)(*args)
    return overload(op).default(*args)


class backend(TorchDispatchMode):
    """Context manager in which every op runs on the named backend: "reference", "cpu", "triton", "cuda" or "sdpa" (attention alone).

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
        reasons = {name: refusal(op, name, call) for name in BACKENDS}
        chosen = next((name for name in _order(op, call) if reasons[name] is None), "reference")
        others = [f"{name}: {reason or 'not preferred here'}" for name, reason in reasons.items() if name != chosen]
        choice = _choice(op, next(a for a in call if isinstance(a, Tensor)).device, call)
        because = f" by {choice}" if choice is not None and choice.backend == chosen else ""
        lines.append(f"{op.name}: {chosen}{because} ({'; '.join(others)})")
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
_ROWS = [
    *OPS.values(),
    *(_backward_row(op) for op in OPS.values() if _has_backward(op)),
    *(_recorded_row(op) for op in OPS.values() if op.recorded),
]
for _op in _ROWS:
    _register(_op)
_loader.load()
for _op in _ROWS:
    _implement(_op)
_BY_OVERLOAD = {overload(op).default: op for op in _ROWS}
TABLE: dict[str, Op] = {op.name: op for op in _ROWS}
