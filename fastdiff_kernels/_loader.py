"""Finds and loads the compiled library, and says plainly when it cannot."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_native.so"
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
REBUILD = "pip install --force-reinstall --no-deps . in the source folder (in a checkout: make build)"


@functools.cache
def load() -> str | None:
    """Loads the compiled library; returns None, or the reason why its kernels are not available.

    Raises:
        ValueError: FASTDIFF_ISA, which limits the instruction set, is none that kernels are compiled for.
    """
    limit = os.environ.get("FASTDIFF_ISA")
    if limit is not None and limit not in INSTRUCTION_SETS:
        raise ValueError(f"FASTDIFF_ISA must be one of {', '.join(map(repr, INSTRUCTION_SETS))}, or not be set; got {limit!r}")
    if not LIBRARY.exists():
        return (
            "the compiled library is missing: the package was installed without a C++ compiler or without torch's headers. "
            f"Install torch and a compiler (g++ or clang), then run: {REBUILD}"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (
            f"{LIBRARY.name} was built for torch >= {build_report().get('torch_target', 'unknown')} and does not load in torch "
            f"{torch.__version__}: {error}. Rebuild it with: {REBUILD}"
        )
    return None


def instruction_set() -> str | None:
    """Which of INSTRUCTION_SETS the loaded library's CPU kernels use; None where it is too old to tell."""
    library = ctypes.CDLL(str(LIBRARY))
    if not hasattr(library, "fastdiff_instruction_set"):
        return None
    library.fastdiff_instruction_set.restype = ctypes.c_char_p
    return library.fastdiff_instruction_set().decode()


def build_report() -> dict:
    """What the package was built with and for; empty when nothing was compiled."""
    try:
        from . import _host  # type: ignore[attr-defined]
    except ImportError:
        return {}
    return json.loads(_host.build_report())
