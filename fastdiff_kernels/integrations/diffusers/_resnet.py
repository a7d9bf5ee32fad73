"""Group norms with the SiLU that follows them.

In diffusers they are neighbouring modules of a block, `norm1`, `nonlinearity`. The norm returns a result that waits (see `_deferred`), and
the activation, called with it, computes both; of anything else (the block also uses it for the time embedding) it is SiLU. Whatever comes
between the two, or watches one of them, gets the norm's tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from .._policy import pays
from .._swap import Replacement, is_watched
from ._deferred import Deferred


class GroupNormed(Deferred):
    """group_norm(x), which may become SiLU(group_norm(x))."""

    def __init__(self, norm: FusedGroupNormSiLU, x: Tensor) -> None:
        self.norm, self.x = norm, x

    def compute(self) -> Tensor:
        return self.norm.plain(self.x)

    def activated(self) -> Tensor:
        norm = self.norm
        return ops.group_norm_silu(self.x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)


class FusedGroupNorm(Replacement, nn.GroupNorm):
    """Group norm alone."""

    replaces = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:
        # Inductor fuses a group norm with its surroundings, which it cannot do across an op.
        if torch.compiler.is_compiling() or not pays("group_norm", input):
            return super().forward(input)
        return ops.group_norm_silu(input, self.num_groups, self.weight, self.bias, eps=self.eps, activation=None)


class FusedGroupNormSiLU(Replacement, nn.GroupNorm):
    """Group norm and the SiLU after it."""

    replaces = nn.GroupNorm

    def plain(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, input: Tensor) -> Any:
        if torch.compiler.is_compiling() or is_watched(self) or not pays("group_norm_silu", input):
            return self.plain(input)
        return GroupNormed(self, input)


class SiLUAfterNorm(Replacement, nn.SiLU):
    """SiLU, together with the group norm before it where that waits."""

    replaces = nn.SiLU

    # Before the module's hooks, which see tensors.
    def __call__(self, input: Any) -> Any:
        if isinstance(input, GroupNormed):
            if not is_watched(self):
                return input.activated()
            input = input.tensor()
        return super().__call__(input)
