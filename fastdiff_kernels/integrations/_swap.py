"""Replacing what a module computes while it stays the object it is.

A module's class is swapped for a subclass of it that computes with this package's ops. Its parameters, buffers, hooks, name and identity
stay, so state dicts, optimisers, `isinstance`, copies, pickles and `torch.compile` see the module they know; undoing is the swap back.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Replacement:
    """Mixed into every class that stands in for a host's."""

    replaces: type[nn.Module]


def swap(module: Any, replacement: type[nn.Module]) -> None:
    """Makes `module` compute as `replacement`, a subclass of its class."""
    module.__class__ = replacement


def restore(module: Any, name: str) -> None:
    """Gives a swapped module its own class again.

    Raises:
        RuntimeError: something replaced its forward after the swap, which still leads to the class it had then.
    """
    if "forward" in vars(module):
        raise RuntimeError(
            f"{name}: its forward was replaced after the patch, by hooks of accelerate or diffusers; remove those before unpatching"
        )
    module.__class__ = module.replaces


def is_watched(module: nn.Module) -> bool:
    """Whether somebody may look at or change what the module takes and returns, so that it has to be called as it is."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in module.__dict__)
