"""Checks of Python numbers and names that the networks, samplers and recipes share; those of the ops name the op as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real


def check_positive(value: float, name: str) -> float:
    """A finite Python number above zero, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def check_number(value: float, name: str, *, minimum: float = -math.inf, maximum: float = math.inf, above: float = -math.inf) -> float:
    """A finite Python number in [minimum, maximum] and greater than `above`, as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    value = float(value)
    if not math.isfinite(value) or not minimum <= value <= maximum or value <= above:
        bounds = [f"> {above}"] * (above > -math.inf) + [f">= {minimum}"] * (minimum > -math.inf) + [f"<= {maximum}"] * (maximum < math.inf)
        raise ValueError(f"{name} must be finite{''.join(' and ' + b for b in bounds)}, got {value}")
    return value


def check_count(value: int, name: str, minimum: int = 1) -> int:
    """A Python integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_choice(value: str, name: str, choices: Sequence[str]) -> str:
    """One of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
