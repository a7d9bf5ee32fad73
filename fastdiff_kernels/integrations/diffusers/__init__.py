"""Hugging Face diffusers: models patched with this package's ops, denoisers from models and schedulers, adaptive skipping, a backend."""

from __future__ import annotations

from .._report import Entry, PatchReport
from ._patch import patch, unpatch

__all__ = ["Entry", "PatchReport", "patch", "unpatch"]
