"""Whether a block under torch.compile calls an op, or leaves its definition to the compiler to fuse with what stands around it.

In eager mode the op always runs. A compiler cannot look into an op, and so cannot fuse it with its neighbours; it can into the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _choices, ops
from .._checks import check_choice
from .._registry import OPS, Op

POLICIES = ("auto", "always", "never")


def check_policy(policy: str) -> str:
    """`policy`, one of "auto", "always" and "never"."""
    return check_choice(policy, "policy", POLICIES)


def apply(policy: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """ops.<name>(*args, **kwargs), or the same by its definition.

    Args:
        policy: under torch.compile, "always" calls the op, "never" the definition, and "auto" what `choices.csv` found the faster for this
            op, its `form`, device and size, with gradients recorded or not (the op where the table has no row).
        name: of a function in `fastdiff_kernels.ops`; its first argument is a tensor.
    """
    if torch.compiler.is_compiling() and (policy == "never" or (policy == "auto" and _left_to_the_compiler(name, args, kwargs))):
        return _DEFINITIONS[name](*args, **kwargs)
    return getattr(ops, name)(*args, **kwargs)


def form(name: str, *args: Any, **kwargs: Any) -> str:
    """What `choices.csv` calls compiled calls like ops.<name>(*args, **kwargs): how well a rotation is compiled depends on its pairs."""
    return f"{name}{_rotation(*args, **kwargs)}" if name == "qk_norm_rope" else name


def _rotation(q: Tensor, k: Tensor, q_weight: Any = None, k_weight: Any = None, cos: Any = None, sin: Any = None, **options: Any) -> str:
    return "" if cos is None else f" {options.get('rope', 'interleaved')}"


def _left_to_the_compiler(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    size = OPS[name].size
    if size is None:
        return False
    rows, width = size(*args)
    # A constant of the graph, which torch.compile traces again for the other.
    mode = "compiled" if torch.is_grad_enabled() else "compiled_inference"
    for (low, high), (narrow, wide), backend in _rows(form(name, *args, **kwargs), args[0].device, mode):
        if low <= rows <= high and narrow <= width <= wide:
            return backend == "inductor"
    return False


@torch.compiler.assume_constant_result
def _rows(called: str, device: torch.device, mode: str) -> tuple[tuple[tuple[float, float], tuple[float, float], str], ...]:
    """What the table says of calls of one form on one device in one mode."""
    devices = _choices.device_names(device)
    chosen = (c for c in _choices.table() if c.op == called and c.device in devices and c.mode == mode)
    return tuple((c.rows, c.width, c.backend) for c in chosen)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, key_lengths: Tensor | None = None) -> Tensor:
    """`ops.attention` made of what the compiler knows; its definition would write the probabilities to memory."""
    mask = None
    if key_lengths is not None:
        mask = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]  # [B, M]
        # What stands in the padding may be NaN, which a probability of zero would not remove.
        k, v = (t.masked_fill(~mask[:, :, None, None], 0) for t in (k, v))
        mask = mask[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def _attention_packed(qkv: Tensor, *, scale: float | None = None, key_lengths: Tensor | None = None) -> Tensor:
    q, k, v = qkv.unbind(2)
    return _attention(q, k, v, scale=scale, key_lengths=key_lengths)


def _public(op: Op) -> Callable[..., Any]:
    """op's definition without the outputs that are there for its backward alone."""

    def definition(*args: Any, **kwargs: Any) -> Any:
        outputs = op.reference(*args, **kwargs)
        primary = tuple(outputs[i] for i in op.primary)
        return primary[0] if len(primary) == 1 else primary

    return definition if op.auxiliary else op.reference


_DEFINITIONS: dict[str, Callable[..., Any]] = {name: _public(op) for name, op in OPS.items()} | {
    "attention": _attention,
    "attention_packed": _attention_packed,
}
