"""Finds and loads the compiled library, and says plainly when it cannot."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_native.so"


@functools.cache
def load() -> str | None:
    """Loads the compiled library; returns None, or the reason why its kernels are not available."""
    if not LIBRARY.exists():
        return (
            "the compiled library is missing: the package was installed without a C++ compiler or without torch's headers. "
            "Install a compiler (g++ or clang), then run: pip install --no-build-isolation --force-reinstall --no-deps fastdiff-kernels"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (
            f"{LIBRARY.name} was built for torch >= {build_report().get('torch_target', 'unknown')} and does not load in torch "
            f"{torch.__version__}: {error}. Rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps fastdiff-kernels"
        )
    return None


def build_report() -> dict:
    """What the package was built with and for; empty when nothing was compiled."""
    try:
        from . import _host  # type: ignore[attr-defined]
    except ImportError:
        return {}
    return json.loads(_host.build_report())


@functools.cache
def warn_missing() -> None:
    """Says once in a process that CPU tensors run the PyTorch definitions, and what to do about it."""
    warnings.warn(f"fastdiff_kernels runs its PyTorch definitions on CPU tensors: {load()}", RuntimeWarning, stacklevel=3)
