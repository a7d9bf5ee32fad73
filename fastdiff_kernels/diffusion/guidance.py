"""Classifier-free guidance, and the conditioning of a doubled batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def guide(denoised: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """uncond + guidance (denoised - uncond), all [B, ...]; `denoised` itself without `uncond` (Ho and Salimans, arXiv 2207.12598)."""
    return denoised if uncond is None else uncond + guidance * (denoised - uncond)


def check_conditioning(conditioning: Mapping[str, object] | None, batch: int, name: str) -> dict[str, object]:
    """Keyword arguments of a denoiser: tensors [batch, ...], Python scalars that hold for the whole batch, and dicts of these in any depth.

    None for all of it is no argument; as a value it is handed on.
    """
    if conditioning is None:
        return {}
    if not isinstance(conditioning, Mapping):
        raise TypeError(f"{name} must be a dict of keyword arguments for the denoiser, got {type(conditioning).__name__}")
    for key, value in leaves(conditioning, name):
        if isinstance(value, Tensor):
            if value.ndim == 0 or value.shape[0] != batch:
                raise ValueError(f"{key} must have one row for each of the {batch} samples, got shape {list(value.shape)}")
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            raise TypeError(f"{key} must be a tensor [B, ...] or a scalar, got {type(value).__name__}")
    return map_tensors(lambda value: value, conditioning)


def leaves(conditioning: Mapping[str, object], name: str) -> Iterator[tuple[str, object]]:
    """What is no dict, with the expression it is reached by."""
    for key, value in conditioning.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{name}[{key!r}]")
        else:
            yield f"{name}[{key!r}]", value


def map_tensors(function: Callable[[Tensor], Tensor], conditioning: Mapping[str, object]) -> dict[str, Any]:
    """The same dict, of dicts, with function(tensor) in place of each tensor."""
    mapped: dict[str, Any] = {}
    for key, value in conditioning.items():
        if isinstance(value, Mapping):
            mapped[key] = map_tensors(function, value)
        else:
            mapped[key] = function(value) if isinstance(value, Tensor) else value
    return mapped


def stack_conditioning(
    conditioning: Mapping[str, object], unconditional: Mapping[str, object], names: tuple[str, str] = ("conditioning", "unconditional")
) -> dict[str, object]:
    """The conditioning of a batch that holds the conditional samples first and the unconditional ones after them."""
    if conditioning.keys() != unconditional.keys():
        raise ValueError(f"{names[1]} must have {names[0]}'s keys {sorted(conditioning)}, got {sorted(unconditional)}")
    return {key: _stack(value, unconditional[key], (f"{names[0]}[{key!r}]", f"{names[1]}[{key!r}]")) for key, value in conditioning.items()}


def _stack(conditional: object, unconditional: object, names: tuple[str, str]) -> object:
    if isinstance(conditional, Mapping) and isinstance(unconditional, Mapping):
        return stack_conditioning(conditional, unconditional, names)
    if isinstance(conditional, Tensor) and isinstance(unconditional, Tensor):
        if conditional.shape != unconditional.shape or conditional.dtype != unconditional.dtype:
            raise ValueError(
                f"{names[1]} must be like conditioning's, {conditional.dtype} {list(conditional.shape)}, "
                f"got {unconditional.dtype} {list(unconditional.shape)}"
            )
        return torch.cat((conditional, unconditional))
    structured = any(isinstance(value, (Tensor, Mapping)) for value in (conditional, unconditional))
    if structured or conditional != unconditional:
        raise ValueError(f"{names[1]} can differ from conditioning's only where both are tensors")
    return conditional


def take_rows(conditioning: Mapping[str, object], rows: Tensor) -> dict[str, object]:
    """The conditioning of the samples `rows` (int64)."""
    return map_tensors(lambda value: value[rows.to(value.device)], conditioning)
