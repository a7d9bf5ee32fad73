"""Results that wait for the operations a block writes out after them, so that one op computes both.

A transformer block of diffusers says `norm(x) * (1 + scale) + shift` and `residual + gate * branch` in its forward, where no module stands
that could be replaced. The norm and the branch do stand there. Replaced, they return an object in place of their tensor: multiplied and
then added to, as above, it is the op's result, a tensor. Anything else that is done with it is done with the tensor it stands for, which is
then computed as the host would have. So a block that is written otherwise computes what it says, without the op.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ... import ops
from .._policy import pays
from .._swap import Replacement, is_watched
from ._host import FeedForward, FP32LayerNorm

_TIMES = (torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_PLUS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


class Deferred(ABC):
    """What stands for a tensor until it is known what follows."""

    computed: ClassVar[int] = 0
    """How many had to become the tensor they stand for."""
    _tensor: Tensor | None = None

    @abstractmethod
    def compute(self) -> Tensor:
        """The tensor as the host computes it."""

    def times(self, factor: Tensor) -> Deferred | Tensor:
        return self.tensor() * factor

    def plus(self, term: Tensor) -> Tensor:
        return self.tensor() + term

    def tensor(self) -> Tensor:
        if self._tensor is None:
            Deferred.computed += 1
            self._tensor = self.compute()
        return self._tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if len(args) == 2 and not kwargs and isinstance(args[0], Deferred) != isinstance(args[1], Deferred):
            waiting, other = args if isinstance(args[0], Deferred) else args[::-1]
            if isinstance(other, Tensor) and func in _TIMES:
                return waiting.times(other)
            if isinstance(other, Tensor) and func in _PLUS:
                return waiting.plus(other)
        args, kwargs = tree_map_only(Deferred, Deferred.tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)


def _forwarded(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def call(self: Deferred, *args: Any) -> Any:
        return self.__torch_function__(function, (), (self, *args))

    return call


# Python looks operators up in the class, where __getattr__ does not reach.
for _name in (
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__matmul__", "__rmatmul__"),
    *("__neg__", "__pow__", "__getitem__", "__setitem__", "__len__", "__iter__", "__bool__", "__float__", "__lt__", "__gt__"),
):
    setattr(Deferred, _name, _forwarded(_name))


class Normed(Deferred):
    """norm(x), which may become norm(x) (1 + scale) + shift."""

    def __init__(self, norm: Any, x: Tensor) -> None:
        self.norm, self.x = norm, x

    def compute(self) -> Tensor:
        return self.norm.plain(self.x)

    def times(self, factor: Tensor) -> Deferred | Tensor:
        return Scaled(self, factor) if _modulates(factor, self.x) else super().times(factor)


class Scaled(Deferred):
    """norm(x) (1 + scale)."""

    def __init__(self, normed: Normed, factor: Tensor) -> None:
        self.normed, self.factor = normed, factor

    def compute(self) -> Tensor:
        return self.normed.tensor() * self.factor

    def plus(self, term: Tensor) -> Tensor:
        norm, x = self.normed.norm, self.normed.x
        if not _modulates(term, x):
            return super().plus(term)
        # The host rounded 1 + scale; taking the 1 off again, and adding it back in the op, rounds nothing.
        return ops.layer_norm_modulate(x, term, self.factor - 1, eps=norm.eps)


class Branch(Deferred):
    """A branch, which may become residual + gate branch."""

    def __init__(self, branch: Tensor) -> None:
        self.branch = branch

    def compute(self) -> Tensor:
        return self.branch

    def float(self) -> Deferred | Tensor:
        return self if self.branch.dtype == torch.float32 else self.tensor().float()

    def times(self, factor: Tensor) -> Deferred | Tensor:
        return Gated(self.branch, factor) if _modulates(factor, self.branch) else super().times(factor)


class Gated(Deferred):
    """gate branch."""

    def __init__(self, branch: Tensor, gate: Tensor) -> None:
        self.branch, self.gate = branch, gate

    def compute(self) -> Tensor:
        return self.branch * self.gate

    def plus(self, term: Tensor) -> Tensor:
        if (term.shape, term.dtype) != (self.branch.shape, self.branch.dtype):
            return super().plus(term)
        return ops.gate_residual(term, self.branch, self.gate)


def branch(module: nn.Module, output: Tensor) -> Any:
    """What `module` returned, as a branch where nobody else looks at it."""
    return Branch(output) if _waits(module, output, "gate") else output


class FusedLayerNorm(Replacement, nn.LayerNorm):
    """A norm without weights, and the modulation that the block writes out after it."""

    replaces = nn.LayerNorm

    def plain(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, input: Tensor) -> Any:
        return Normed(self, input) if _waits(self, input, "norm") else self.plain(input)


class FusedFP32LayerNorm(Replacement, FP32LayerNorm):
    """The same, for a norm in float32."""

    replaces = FP32LayerNorm

    def plain(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, inputs: Tensor) -> Any:
        return Normed(self, inputs) if _waits(self, inputs, "norm") else self.plain(inputs)


class GatedFeedForward(Replacement, FeedForward):
    """A feed-forward, and the gate and residual that the block writes out after it."""

    replaces = FeedForward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return branch(self, super().forward(hidden_states, *args, **kwargs))


class GatedLinear(Replacement, nn.Linear):
    """A projection, and the gate and residual that the block writes out after it."""

    replaces = nn.Linear

    def forward(self, input: Tensor) -> Any:
        return branch(self, super().forward(input))


REPLACEMENTS: dict[type, type] = {cls.replaces: cls for cls in (FusedLayerNorm, FusedFP32LayerNorm, GatedFeedForward, GatedLinear)}


def _waits(module: nn.Module, x: Tensor, op: str) -> bool:
    # Inductor fuses these operations by itself. Under autocast a norm may return another dtype than it was given.
    return not (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.dim() != 3
        or is_watched(module)
        or (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
        or not pays(op, x)
    )


def _modulates(factor: Tensor, x: Tensor) -> bool:
    """Whether `factor` is as the ops take modulations and gates for x [B, N, C], and leaves the result in x's dtype."""
    batch, tokens, channels = x.shape
    return factor.dtype == x.dtype and factor.shape in ((batch, 1, channels), (batch, tokens, channels))
