"""The ops that accompany a differentiable op f, made of its row: f_backward, and f_recorded where the row asks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._registry import OPS, Op, channels_last_aware_empty


def _inputs(op: Op) -> str:
    return op.schema[1:].split(") -> ")[0]


def _returns(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def one_or_all(tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def as_tuple(tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
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
    saved = [f"Tensor saved{i}" for i in range(len(op.saved))]
    declared = [*(f"{kind} grad{i}" for i in op.primary), inputs, *saved, f"bool[{len(wanted)}] needs"]

    def call(args: Sequence[Any]) -> Sequence[Any]:
        return args[grads : grads + count]

    def reference(*args: Any) -> Tensor | tuple[Tensor, ...]:
        return _vjp_below_autograd(op, wanted, args[:grads], call(args), args[-1])

    def fake(*args: Any) -> Tensor | tuple[Tensor, ...]:
        empty = channels_last_aware_empty if op.keeps_channels_last else _contiguous_empty
        return one_or_all([empty(call(args)[i]) if need else _absent(call(args)) for i, need in zip(wanted, args[-1], strict=True)])

    size, of_call = _about_call(op, call)

    def refuses_either(name: str, *args: Any) -> str | None:
        of_gradients = None if op.refuses_gradients is None else op.refuses_gradients(name, *args[:grads])
        return of_gradients or (None if of_call is None else of_call(name, *args))

    return Op(
        name=f"{op.name}_backward",
        family=op.family,
        schema=f"({', '.join(declared)}) -> {_returns(len(wanted))}",
        reference=reference,
        fake=fake,
        kernels=op.kernels,
        size=size,
        refuses=of_call if op.refuses_gradients is None else refuses_either,
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
    """The table's row of f_recorded: f's output, and the gradients of its sum."""
    wanted = _places(op)

    def reference(*args: Any) -> tuple[Tensor, ...]:
        output = op.reference(*args[:-1])
        return (output, *as_tuple(_vjp_below_autograd(op, wanted, [torch.ones_like(output)], args[:-1], args[-1])))

    def fake(*args: Any) -> tuple[Tensor, ...]:
        gradients = [_contiguous_empty(args[i]) if need else _absent(args) for i, need in zip(wanted, args[-1], strict=True)]
        return (op.fake(*args[:-1]), *gradients)

    size, refuses = _about_call(op, lambda args: args[:-1])
    return Op(
        name=f"{op.name}_recorded",
        family=op.family,
        schema=f"({_inputs(op)}, bool[{len(wanted)}] needs) -> {_returns(1 + len(wanted))}",
        reference=reference,
        fake=fake,
        kernels=op.kernels,
        size=size,
        refuses=refuses,
        recorded_of=op.name,
    )


def _contiguous_empty(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _absent(args: Sequence[Any]) -> Tensor:
    """What stands for a gradient nobody asked for."""
    first = next(a for a in args if isinstance(a, Tensor))
    return first.new_empty(0)


def vjp(op: Op, wanted: Sequence[int], grads: Sequence[Tensor | None], call: Sequence[Any], needs: Sequence[bool]):
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
        # An output need not depend on the arguments whose gradient is asked for.
        used = [(o, grad) for o, grad in zip(of_chosen(*leaves), grads, strict=True) if grad is not None and o.requires_grad]
        if used:
            found = torch.autograd.grad([o for o, _ in used], leaves, [grad for _, grad in used], materialize_grads=True)
        else:
            found = tuple(torch.zeros_like(leaf) for leaf in leaves)
    return _spread(found, call, needs)


def _restrict(op: Op, wanted: Sequence[int], call: Sequence[Any], needs: Sequence[bool]) -> tuple[list[int], Callable]:
    """The indices of the arguments whose gradient is asked for, and op's definition as a function of them to what has a derivative."""
    chosen = [i for i, need in zip(wanted, needs, strict=True) if need]

    def of_chosen(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(call)
        for i, tensor in zip(chosen, tensors, strict=True):
            full[i] = tensor
        outputs = as_tuple(op.reference(*full))
        return tuple(outputs[i] for i in op.primary)

    return chosen, of_chosen


def _spread(found: Sequence[Tensor], call: Sequence[Any], needs: Sequence[bool]):
    """The gradients found in their places, with what stands for absence in the others."""
    remaining = iter(found)
    return one_or_all([next(remaining) if need else _absent(call) for need in needs])


def _exclude_without_autograd() -> torch._C.DispatchKeySet:
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    return exclude


def has_backward(op: Op) -> bool:
    """Whether some argument's gradient is computed by kernels."""
    return set(op.differentiable) > set(op.traced)


TABLE: dict[str, Op] = {
    op.name: op
    for op in (
        *OPS.values(),
        *(_backward_row(op) for op in OPS.values() if has_backward(op)),
        *(_recorded_row(op) for op in OPS.values() if op.recorded),
    )
}
"""All ops: those of the registry, then their companions."""
