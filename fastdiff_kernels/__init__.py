"""Fused kernels and distillers that make diffusion models faster to train, distil and sample."""

from . import (
    _dispatch,  # noqa: F401  (registers the ops)
    ops,
)
from ._backends import backend, explain

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "explain", "ops"]
