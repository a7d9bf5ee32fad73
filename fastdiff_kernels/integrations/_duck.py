"""Replacing modules that are known by what they are made of, after their forward was compared with the one that replaces it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ._policy import everywhere
from ._report import Entry, PatchReport
from ._swap import Replacement, is_watched, restore_all, swap

_TOLERANCE = 1e-4


class Shape(Replacement, ABC):
    """A mixin with the forward that replaces a host's, for every class that looks like it."""

    parts: tuple[str, ...]
    """Attributes that a module of this shape has."""
    folded: tuple[str, ...] = ()
    """Those of them that are modules and whose work an op does, so that nobody calls them."""

    @classmethod
    @abstractmethod
    def refusal(cls, module: Any) -> str | None:
        """Why a module with these parts is none of this shape after all, or None."""

    @classmethod
    def prepare(cls, module: Any) -> None:
        """Makes random parameters valid ones, in place, for the comparison."""

    @classmethod
    @abstractmethod
    def example(cls, module: Any) -> tuple[Tensor, ...]:
        """Small float32 arguments of the module's forward."""

    def is_watched(self) -> bool:
        """Whether hooks wait for a folded part, which the host's forward calls and this package's does not."""
        return any(is_watched(getattr(self, name)) for name in self.folded)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        # Classes of EDM and EDM2 reduce to the source of the class that was replaced.
        kind: Any = type(self)
        twin = kind.__new__(kind)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin


@cache
def _subclass(shape: Any, kind: Any) -> Any:
    return type(f"Fused{kind.__name__}", (shape, kind), {"replaces": kind, "__module__": kind.__module__})


def patch_shapes(model: nn.Module, shapes: Sequence[type[Shape]]) -> PatchReport:
    """Swaps the class of every module that has one of these shapes and computes what it says."""
    entries = [_patch(name, module, shapes) for name, module in model.named_modules()]
    return PatchReport(type(model).__name__, entries)


def unpatch_shapes(model: nn.Module, shapes: Sequence[type[Shape]]) -> None:
    """Undoes `patch_shapes`."""
    restore_all((name, module) for name, module in model.named_modules() if isinstance(module, tuple(shapes)))


def _patch(name: str, module: Any, shapes: Sequence[Any]) -> Entry:
    if isinstance(module, Shape):
        kept, reason = module.replaces.__name__, _hooked(module, module)
        return Entry(name, kept, reason=reason) if reason else Entry(name, kept, replacement=type(module).__name__)
    kind: Any = type(module)
    shape = next((shape for shape in shapes if all(hasattr(module, part) for part in shape.parts)), None)
    if shape is None:
        return Entry(name, kind.__name__, reason="no op here computes it")
    reason = _obstacle(module, shape) or shape.refusal(module) or _difference(module, shape)
    if reason is not None:
        return Entry(name, kind.__name__, reason=reason)
    swap(module, _subclass(shape, kind))
    return Entry(name, kind.__name__, replacement=type(module).__name__)


def _obstacle(module: Any, shape: Any) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced by hooks"
    if any(t.is_meta for t in chain(module.parameters(), module.buffers())):
        return "its parameters are on the meta device: patch it when they are loaded"
    return _hooked(module, shape)


def _hooked(module: Any, shape: Any) -> str | None:
    names = [name for name in shape.folded if is_watched(getattr(module, name))]
    return f"hooks watch its {' and '.join(names)}, which the op would not call" if names else None


def _difference(module: Any, shape: Any) -> str | None:
    """Both forwards on a copy with random parameters: those at zero would hide what they multiply."""
    kind: Any = type(module)
    # Hosts may compile parts of their forward, for which a comparison is not worth waiting.
    eager = torch.compiler.set_stance("force_eager")
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), eager:
        torch.manual_seed(0)
        try:
            # Nobody asked to see these calls.
            unseen: dict[int, Any] = {id(hooks): OrderedDict() for child in module.modules() for hooks in _hooks(child)}
            twin = copy.deepcopy(module, unseen).to(device="cpu", dtype=torch.float32).eval()
            for original, child in zip(module.modules(), twin.modules(), strict=True):
                swap(child, type(original))  # a host's own way to copy may lead to another class
            for parameter in twin.parameters():
                fan = parameter[0].numel() if parameter.dim() > 1 else 4
                parameter.copy_(torch.randn(parameter.shape) / max(fan, 1) ** 0.5)
            shape.prepare(twin)
            args = shape.example(twin)
            before: Tensor = twin(*[a.clone() for a in args])
            swap(twin, _subclass(shape, kind))
            with everywhere():
                after: Tensor = twin(*[a.clone() for a in args])
        except Exception as error:  # a stranger's forward may raise anything
            return f"it has the parts of {shape.__name__} and cannot be called as one: {type(error).__name__}: {error}"
    scale = max(before.abs().max().item(), 1.0)
    if before.shape != after.shape or not (before - after).abs().max().item() <= _TOLERANCE * scale:
        return f"it has the parts of {shape.__name__} and computes something else"
    return None


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
