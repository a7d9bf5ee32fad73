"""Sharding rules of the ops for DTensor; importing this module registers them.

    import fastdiff_kernels.distributed

A batch may be split over devices along dimension 0: samples are independent of each other. Weights and modulation [C] are replicated,
and their gradients come back as partial sums. Ops that draw noise are replicated only: the noise of a sample depends on its index in the
batch, which its shard does not know; give each rank its `offset` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

from . import _dispatch  # noqa: F401  (registers the ops)
from ._companions import TABLE
from ._registry import OPS, Op, overload

_WITH_SHARED_VECTORS = ("modulate", "rotary", "group_norm")
_SHARED = ("table",)


def _tensor_like(argument: Any) -> bool:
    return hasattr(argument, "shape")


def _is_batched(op: Op, name: str, argument: Any, sample: Any) -> bool:
    """Whether an argument has a row for each sample of the batch."""
    dims = len(argument.shape)
    if name in _SHARED or dims == 0 or argument.shape[0] != sample.shape[0]:
        return False
    if op.family in _WITH_SHARED_VECTORS:
        # Vectors are weights; of the two shapes that rotary tables have, the one with a batch has three dimensions.
        return dims > 2 if op.family == "rotary" else dims > 1
    return True


# Placements of the outputs and, for them, of the arguments; None stands beside an argument that is no tensor.
Acceptable = tuple[Sequence[Placement], Sequence[Placement | None]]


def _rule(op: Op) -> Callable[..., list[Acceptable]]:
    forward = OPS[op.companion_of or op.name]
    outputs = len(overload(op).default._schema.returns)
    gradients = len(forward.primary) if op.backward_of else 0

    def rule(*args: Any) -> list[Acceptable]:
        call = args[gradients : gradients + len(forward.arguments)]
        whole: Acceptable = ([Replicate()] * outputs, [Replicate() if _tensor_like(a) else None for a in args])
        if not _splits(forward, call[0]):
            return [whole]
        given = [_placement(forward, name, a, call[0]) for name, a in zip(op.arguments, args, strict=True)]
        if not op.companion_of:
            return [whole, ([Shard(0)] * outputs, given)]
        wanted = [(name, call[forward.arguments.index(name)]) for name in forward.differentiable]
        found = _of_gradients(forward, wanted, args[-1], call[0])
        return [whole, ([Shard(0), *found] if op.recorded_of else found, given)]

    return rule


def _splits(op: Op, sample: Any) -> bool:
    if "seed" in op.arguments or not sample.shape:
        return False
    # A decision may be one for the whole batch.
    return op.name != "solver_step" and (op.name != "integrate_schedule" or len(sample.shape) > 1)


def _placement(op: Op, name: str, argument: Any, sample: Any) -> Placement | None:
    if not _tensor_like(argument):
        return None
    return Shard(0) if _is_batched(op, name, argument, sample) else Replicate()


def _of_gradients(op: Op, wanted: Sequence[tuple[str, Any]], needs: Sequence[bool], sample: Any) -> list[Placement]:
    """Of samples: split; of what they share: partial sums; of what nobody asked for: an empty tensor everywhere."""
    return [
        (Shard(0) if _is_batched(op, name, argument, sample) else Partial()) if need else Replicate()
        for (name, argument), need in zip(wanted, needs, strict=True)
    ]


for _op in TABLE.values():
    register_sharding(overload(_op).default)(_rule(_op))
