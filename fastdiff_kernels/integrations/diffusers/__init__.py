"""Hugging Face diffusers: models patched with this package's ops, denoisers from models and schedulers, adaptive skipping, a backend."""

from __future__ import annotations

from .._denoiser import ModelDenoiser
from .._report import Entry, PatchReport
from ._backend import register_attention_backend, reset_attention_backend, set_attention_backend, unregister_attention_backend
from ._denoiser import as_denoiser
from ._patch import patch, unpatch
from ._skip import SkipHandle, disable_adaptive_skip, enable_adaptive_skip
from ._student import student_scheduler
from .scheduler import StudentScheduler

__all__ = [
    "Entry",
    "ModelDenoiser",
    "PatchReport",
    "SkipHandle",
    "StudentScheduler",
    "as_denoiser",
    "disable_adaptive_skip",
    "enable_adaptive_skip",
    "patch",
    "register_attention_backend",
    "reset_attention_backend",
    "set_attention_backend",
    "student_scheduler",
    "unpatch",
    "unregister_attention_backend",
]
