"""States of runs: copies of them, and whether one fits the recipe that is to go on from it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn


def in_memory(state: Any) -> Any:
    """Nested dicts of tensors, copied into main memory: no tensor is shared with the state given."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # keeps the metadata that a module's state has beside its entries
        for name, value in state.items():
            copied[name] = in_memory(value)
        return copied
    return state


def plain(value: object) -> Any:
    """A setting as something that a file can hold and that compares: numbers, strings, None, and names of what has no value to compare."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, torch.dtype) or is_dataclass(value):
        return repr(value)
    return type(value).__name__


def check_keys(state: object, expected: Iterable[str], name: str) -> Mapping[str, Any]:
    """A dict that has the expected keys."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{name} must be a dict, got {type(state).__name__}")
    missing = [key for key in expected if key not in state]
    if missing:
        raise ValueError(
            f"{name} must hold {', '.join(missing)} too, as this version saves it, got {', '.join(map(str, state)) or 'nothing'}"
        )
    return state


def check_settings(state: object, own: Mapping[str, object]) -> None:
    """Equal values, name by name."""
    held = check_keys(state, own, "the state's settings")
    for name, value in own.items():
        if held[name] != value:
            raise ValueError(f"{name} must be the state's {held[name]!r}, got {value!r}")


def check_network(state: object, network: nn.Module, name: str) -> None:
    """A state dict of `network`: tensors of the same names and shapes."""
    own = network.state_dict()
    held = check_keys(state, own, name)
    for key, value in held.items():
        expected = _shape(own.get(key))
        if _shape(value) != expected:
            raise ValueError(f"{name} must hold {expected} for {key}, got {_shape(value)}")


def check_moments(state: object, parameters: list[nn.Parameter], name: str) -> None:
    """A state dict of an Adam over `parameters`."""
    held = check_keys(state, ("state", "param_groups"), name)
    count = sum(len(group["params"]) for group in held["param_groups"])
    if count != len(parameters):
        raise ValueError(f"{name} must be of {len(parameters)} trained parameters, got one of {count}")
    for index, moments in held["state"].items():
        if moments["exp_avg"].shape != parameters[index].shape:
            raise ValueError(f"{name} must hold {_shape(parameters[index])} for parameter {index}, got {_shape(moments['exp_avg'])}")


def restored_generator(state: object, device: torch.device) -> torch.Generator:
    """A generator on the device with the state that was taken of one."""
    if not isinstance(state, Tensor):
        raise ValueError(f"rng must be the state of a random generator, got {type(state).__name__}")
    generator = torch.Generator(device=device)
    try:
        generator.set_state(state.cpu())
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"rng must be the state of a {device.type} generator, got {list(state.shape)} of {state.dtype}: {error}"
        ) from error
    return generator


def _shape(value: object) -> str:
    if value is None:
        return "nothing"
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
