"""Hugging Face diffusers: models patched with this package's ops, denoisers from models and schedulers, adaptive skipping, a backend."""

from __future__ import annotations

from .._report import Entry, PatchReport
from ._denoiser import ModelDenoiser, as_denoiser
from ._patch import patch, unpatch

__all__ = ["Entry", "ModelDenoiser", "PatchReport", "as_denoiser", "patch", "unpatch"]
