"""Replacing what a module computes while it stays the object it is.

A module's class is swapped for a subclass of it that computes with this package's ops. Its parameters, buffers, hooks, name and identity
stay, so state dicts, optimisers, `isinstance`, copies, pickles and `torch.compile` see the module they know; undoing is the swap back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


class Replacement:
    """Mixed into every class that stands in for a host's."""

    replaces: type[nn.Module]


def swap(module: Any, replacement: type[nn.Module]) -> None:
    """Makes `module` compute as `replacement`, a subclass of its class."""
    module.__class__ = replacement


def restore_all(modules: Iterable[tuple[str, Any]]) -> None:
    """Gives swapped modules, each behind its name, their own classes again: all of them or, where one cannot be restored, none.

    Raises:
        RuntimeError: something replaced a forward after the swap, which still leads to the class the module had then.
    """
    modules = list(modules)
    for name, module in modules:
        _check_forward(module, name)
    for _, module in modules:
        module.__class__ = module.replaces


def is_watched(module: nn.Module) -> bool:
    """Whether somebody may look at or change what the module takes and returns, so that it has to be called as it is."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or "forward" in module.__dict__ or _has_any_global_hook())


def _check_forward(module: nn.Module, name: str) -> None:
    if "forward" in vars(module):
        raise RuntimeError(
            f"{name}: its forward was replaced after the patch, by hooks of accelerate or diffusers; remove those before unpatching"
        )
