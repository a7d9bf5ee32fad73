"""diffusers' normalisation layers with modulation, as one op each. Every class computes what its base does, from the base's submodules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from .._policy import pays
from .._swap import Replacement, is_watched
from . import _host as host


class FusedAdaLayerNormZero(Replacement, host.AdaLayerNormZero):
    replaces = host.AdaLayerNormZero

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)  # [B, C] each
        return modulated(self.norm, x, shift, scale), gate, shift_mlp, scale_mlp, gate_mlp


class FusedAdaLayerNormZeroSingle(Replacement, host.AdaLayerNormZeroSingle):
    replaces = host.AdaLayerNormZeroSingle

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)  # [B, C] each
        return modulated(self.norm, x, shift, scale), gate


class FusedSD35AdaLayerNormZeroX(Replacement, host.SD35AdaLayerNormZeroX):
    replaces = host.SD35AdaLayerNormZeroX

    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        if is_watched(self.norm):  # its one output is modulated twice
            return super().forward(hidden_states, emb)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        first, second = modulated(self.norm, hidden_states, shift, scale), modulated(self.norm, hidden_states, shift2, scale2)
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


class FusedAdaLayerNormContinuous(Replacement, host.AdaLayerNormContinuous):
    replaces = host.AdaLayerNormContinuous

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        # Here the projection's first half is the scale.
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)  # [B, C] each
        return modulated(self.norm, x, shift, scale)


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift for x [B, N, C], shift and scale [B, C], in one op where that pays and gives the dtype PyTorch gives."""
    # A modulation wider than x widens the result in PyTorch, and keeps x's dtype in the op.
    narrow = x.dim() == 3 and torch.promote_types(x.dtype, shift.dtype) == x.dtype
    if not narrow or is_watched(norm) or not (torch.compiler.is_compiling() or pays("norm", x)):
        return norm(x) * (1 + scale[:, None]) + shift[:, None]
    shift, scale = shift.to(x.dtype), scale.to(x.dtype)
    if isinstance(norm, host.RMSNorm):
        return ops.rms_norm_modulate(x, norm.weight, shift, scale, eps=norm.eps)
    return ops.layer_norm_modulate(x, shift, scale, eps=norm.eps)


def refusal(module: Any) -> str | None:
    """Why a layer of one of the classes above cannot be computed by an op, or None."""
    norm = module.norm
    if type(norm) is host.RMSNorm:
        return None if norm.bias is None else "its RMSNorm has a bias"
    if type(norm) not in (nn.LayerNorm, host.FP32LayerNorm):
        return f"its norm is a {type(norm).__name__}"
    return "its LayerNorm has weights of its own beside the modulation" if norm.weight is not None else None


REPLACEMENTS = {
    cls.replaces: cls
    for cls in (FusedAdaLayerNormZero, FusedAdaLayerNormZeroSingle, FusedSD35AdaLayerNormZeroX, FusedAdaLayerNormContinuous)
}
