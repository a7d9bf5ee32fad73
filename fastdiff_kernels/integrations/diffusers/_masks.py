"""Attention masks that say no more than how many keys a sample has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# diffusers adds -10000 to the scores of padding; bfloat16 rounds that to -9984.
_PADDING = -9984.0
_proven: WeakIdKeyDictionary = WeakIdKeyDictionary()


def key_lengths(mask: Tensor, batch: int, keys: int) -> Tensor | None:
    """Lengths int64 [B] such that sample b may attend to its first lengths[b] keys alone, or None where the mask does not say just that.

    Args:
        mask: bool (True attends) or additive, [B, M], [B, 1, M] or [B, 1, 1, M] with M = keys. Additive masks are 0 or at most -9984.

    The values are looked at, which waits for a GPU once for each mask; the answer is kept as long as the mask is. Nothing can be looked at
    while a graph is traced, so there the answer is None. A sample without keys gets None as well: PyTorch's softmax then attends to all.
    """
    if torch.compiler.is_compiling() or mask.shape not in ((batch, keys), (batch, 1, keys), (batch, 1, 1, keys)):
        return None
    if mask.is_inference():
        return _prove(mask.reshape(batch, keys))
    known = _proven.get(mask)
    if known is None or known[0] != mask._version:
        known = (mask._version, _prove(mask.detach().reshape(batch, keys)))
        _proven[mask] = known
    return known[1]


def _prove(mask: Tensor) -> Tensor | None:
    attends = mask if mask.dtype == torch.bool else mask == 0  # [B, M]
    lengths = attends.sum(1)
    prefix = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    proof = (attends == prefix).all() & (lengths > 0).all()
    if mask.dtype != torch.bool:
        proof &= (attends | (mask <= _PADDING)).all()
    return lengths if bool(proof) else None
