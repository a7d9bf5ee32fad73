"""Group norms with the SiLU that follows them.

In diffusers they are neighbouring modules of one block, `norm1`, `nonlinearity`. The norm computes both and marks its output; the
activation returns a tensor with that mark as it is, and activates any other (the block also uses it for the time embedding). Should
something come between the two, the mark is lost and the result differs by far, which `probes` would show before anything is replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import ops
from .._policy import pays
from .._swap import Replacement, is_watched

_MARK = "_fastdiff_activated"


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

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or is_watched(self) or not pays("group_norm_silu", input):
            return super().forward(input)
        return _marked(ops.group_norm_silu(input, self.num_groups, self.weight, self.bias, eps=self.eps))


class SiLUUnlessFused(Replacement, nn.SiLU):
    """SiLU, but of what a fused norm has activated already."""

    replaces = nn.SiLU

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and hasattr(input, _MARK):
            return input
        return super().forward(input)


def _marked(activated: Tensor) -> Tensor:
    setattr(activated, _MARK, True)
    return activated
