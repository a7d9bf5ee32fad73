"""Norms, feed-forwards and attentions whose modulation, gate and residual are written out in a transformer block's forward."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._swap import Replacement, swap
from . import _processors
from ._deferred import REPLACEMENTS
from ._host import BasicTransformerBlock, FluxSingleTransformerBlock, FluxTransformerBlock, JointTransformerBlock, WanTransformerBlock

# Norms that the block modulates; what it gates, of which attentions by their processors.
_PARTS: dict[Any, tuple[tuple[str, ...], tuple[str, ...]]] = {
    JointTransformerBlock: (("norm2", "norm2_context"), ("attn", "attn2", "ff", "ff_context")),
    FluxTransformerBlock: (("norm2", "norm2_context"), ("attn", "ff", "ff_context")),
    FluxSingleTransformerBlock: ((), ("proj_out",)),
    WanTransformerBlock: (("norm1", "norm3"), ("attn1", "ffn")),
}
_BASIC = {"ada_norm_zero": (("norm3",), ("attn1", "ff")), "ada_norm_single": (("norm1", "norm2"), ("attn1", "ff"))}
KINDS: tuple[Any, ...] = (BasicTransformerBlock, *_PARTS)


def parts(block: Any) -> dict[str, nn.Module]:
    """The modules of a block that take part in what it writes out, by name."""
    norms, branches = _BASIC.get(block.norm_type, ((), ())) if isinstance(block, BasicTransformerBlock) else _PARTS[type(block)]
    found = {name: getattr(block, name, None) for name in (*norms, *branches)}
    return {name: module for name, module in found.items() if module is not None}


def refusal(part: Any) -> str | None:
    """Why one of these modules, other than an attention, is left, or None."""
    if hasattr(part, "lora_A"):  # its class may be named as the layer's that it holds
        return "it is a LoRA layer, which adds to the branch before the block gates it"
    if type(part) not in REPLACEMENTS:
        return f"it is a {type(part).__name__}, which is not known here"
    if isinstance(part, nn.LayerNorm) and part.weight is not None:
        return "it has weights of its own beside the modulation"
    return None


def fuse(part: Any) -> bool:
    """Makes a norm or a branch wait for what the block does with it; False where nobody here computes it."""
    if isinstance(getattr(part, "processor", None), _processors.Fused):
        part.processor.gated = True
        return True
    if type(part) in REPLACEMENTS:
        swap(part, REPLACEMENTS[type(part)])
        return True
    return isinstance(part, Replacement)
