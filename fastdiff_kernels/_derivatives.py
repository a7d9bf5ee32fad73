"""What ops do at the autograd key: they are recorded, run in forward mode, or hand over to their definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function as _single_level
from torch.autograd import forward_ad

from ._backends import note, run_definition
from ._companions import as_tuple, has_backward, one_or_all, vjp
from ._registry import Op, overload
from ._scale import scale_samples

_AUTOGRAD_KEYS = torch._C._after_autograd_keyset
_FORWARD_MODE = "forward mode runs its definition"


def _is_tensor_argument(argument: torch._C.Argument) -> bool:
    return str(argument.type) in ("Tensor", "Optional[Tensor]")


def _forward_mode() -> bool:
    # Inside a compiled graph only the transform is visible, not the level that Python opened.
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _has_tangent(args: Sequence[Any]) -> bool:
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a, level=0).tangent is not None for a in args)


def _dual(op: Op, dual: str, wanted: Sequence[int], args: Sequence[Any]):
    """Outputs and tangents of one call in forward mode, by the op named `dual`, which computes both."""
    pairs = [forward_ad.unpack_dual(a, level=0) if isinstance(a, Tensor) else (a, None) for a in args]
    if any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for _, t in pairs):
        # Its batches (gradcheck's) know no way to make a dual of outputs that a kernel returned as a batch.
        return run_definition(op, _FORWARD_MODE, *args)
    results = getattr(torch.ops.fastdiff, dual).default(*[primal for primal, _ in pairs], *[pairs[i][1] for i in wanted])
    outputs, tangents = results[: op.outputs], results[op.outputs :]
    return one_or_all([forward_ad.make_dual(o, t, level=0) for o, t in zip(outputs, tangents, strict=True)])


def _recording(op: Op, wanted: Sequence[int]) -> type[torch.autograd.function._SingleLevelFunction]:
    """The autograd function of op. What is known of op is looked up here, not in each call, which takes longer than a small op's work."""
    backward_packet = getattr(torch.ops.fastdiff, f"{op.name}_backward").default
    packet = overload(op).default
    recorded_packet = getattr(torch.ops.fastdiff, f"{op.name}_recorded").default if op.recorded else None
    passed = [name in op.passes_through for name in op.differentiable]
    primary, saved, auxiliary, places = op.primary, op.saved, op.auxiliary, [i + 1 for i in wanted]

    def from_inputs(args: list, grads: list, outputs: Sequence[Tensor], needs: list[bool]) -> Sequence[Tensor | None]:
        """The gradients that are needed, where forward left none."""
        if not any(needs):
            return [None] * len(wanted)
        if torch.is_grad_enabled():
            note(f"{op.name}_backward", "reference", "a gradient that may be differentiated in turn is its definition's")
            return as_tuple(vjp(op, wanted, grads, args, needs))
        if recorded_packet is not None and _scalable(args[wanted[0]]) and not _batched(grads[0]):
            return _scaled(recorded_packet(*args, needs)[1:], grads[0], needs)
        if _forward_mode():
            return as_tuple(backward_packet(*grads, *args, *outputs, needs))
        # Nothing is recorded and nothing has a tangent: there is nothing to do at the autograd key.
        with torch._C._AutoDispatchBelowAutograd():
            return as_tuple(backward_packet(*grads, *args, *outputs, needs))

    # A plain Function refuses to run inside torch.func's transforms. Here they have already been peeled off down to one level.
    class Recorded(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, keyset, *args):
            keyset = keyset & _AUTOGRAD_KEYS
            ctx.gradients = None
            if recorded_packet is not None and _scalable(args[wanted[0]]):
                asked = ctx.needs_input_grad
                with torch._C._AutoDispatchBelowAutograd():
                    output, *ctx.gradients = recorded_packet.redispatch(keyset, *args, [asked[i] for i in places])
                outputs = (output,)
            else:
                # Function.forward runs with both modes of differentiation off, which outer levels of torch.func would inherit.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
                    outputs = as_tuple(packet.redispatch(keyset, *args))
            ctx.save_for_backward(*[a for a in args if isinstance(a, Tensor)], *[outputs[i] for i in saved])
            ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in args]
            if auxiliary:
                ctx.mark_non_differentiable(*[outputs[i] for i in auxiliary])
            if op.optional_grads:
                ctx.set_materialize_grads(False)
            return outputs[0] if len(outputs) == 1 else outputs

        @staticmethod
        def backward(ctx, *grads):
            # Looked at in any case: it raises where the graph has been freed.
            tensors, asked = ctx.saved_tensors, ctx.needs_input_grad
            asked = [asked[i] for i in places]
            grads = [grads[i] for i in primary]
            # What forward wrote is scaled in place; another backward makes it afresh.
            gradients, ctx.gradients = ctx.gradients, None
            needs = [a and not p for a, p in zip(asked, passed, strict=True)]
            if gradients is not None and not torch.is_grad_enabled() and not _batched(grads[0]):
                found = _scaled(gradients, grads[0], needs)
            else:
                rest = iter(tensors)
                args = [next(rest) if constant is None else constant[0] for constant in ctx.constants]
                found = from_inputs(args, grads, tuple(rest), needs)
            result = [None] * (len(ctx.constants) + 1)
            for place, need, by_kernel, grad in zip(places, asked, needs, found, strict=True):
                if need:
                    result[place] = grad if by_kernel else grads[0]
            return tuple(result)

    Recorded.__name__ = Recorded.__qualname__ = f"fastdiff_{op.name}"
    return Recorded


def _scaled(gradients: Sequence[Tensor], factor: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    return [scale_samples(gradient, factor) if need else gradient for gradient, need in zip(gradients, needs, strict=True)]


def _scalable(x: Tensor) -> bool:
    """Whether gradients of x may be written before the gradient of the loss is known."""
    # In float16 they would underflow where a scaled loss is there to prevent it; under torch.func they may be batches of one another.
    return x.dtype != torch.float16 and torch._C._functorch.peek_interpreter_stack() is None


def _batched(x: Tensor) -> bool:
    """Whether x stands for many, as the gradients of `is_grads_batched` do."""
    return torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x)


def autograd_kernel(op: Op) -> Callable:
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
    recorded = _recording(op, wanted) if has_backward(op) else None

    def below(keyset: torch._C.DispatchKeySet, args: Sequence[Any]):
        with torch._C._AutoDispatchBelowAutograd():
            return packet.redispatch(keyset & _AUTOGRAD_KEYS, *args)

    def kernel(keyset, *args):
        dual = _forward_mode() and _has_tangent(args)
        recording = torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if not (dual or recording):
            return below(keyset, args)
        if op.companion_of:
            raise RuntimeError(
                f"{op.name} has no derivative of its own; differentiate {op.companion_of}, whose derivatives exist to any order"
            )
        for i, name in refused:
            if args[i] is not None and (args[i].requires_grad or (dual and _has_tangent(args[i : i + 1]))):
                raise ValueError(f"{op.name}: {name} must not require grad or carry a tangent; {_why_refused(op)}")
        # A graph recorded of the dual op would hold its primal inputs without their tangents, which forward over reverse needs.
        if dual and op.dual and not recording:
            return _dual(op, op.dual, wanted, args)
        if dual and op.composed:
            return op.composed(*args)
        if dual:
            return run_definition(op, _FORWARD_MODE, *args)
        if any(isinstance(args[i], Tensor) and args[i].requires_grad for i in traced):
            return run_definition(op, f"only its definition has a gradient of {' and '.join(op.traced)}", *args)
        if not any(isinstance(args[i], Tensor) and args[i].requires_grad for i in wanted):
            return below(keyset, args)
        with _single_level():
            return recorded.apply(keyset, *args)

    return kernel


def without_derivative(packet: torch._ops.OpOverload) -> Callable:
    """packet, called below autograd wherever its kernel there would do no more than that: half the cost of a small call."""

    def call(*args):
        # A compiler has to see the op itself.
        if torch.compiler.is_compiling() or _forward_mode() or (torch._C.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return packet(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return packet(*args)

    return call


def _why_refused(op: Op) -> str:
    if op.differentiable or op.stopped:
        return "it is a constant of this op (detach it)"
    return "this op is for inference only and has no derivative (call it under torch.no_grad() or detach the argument)"
