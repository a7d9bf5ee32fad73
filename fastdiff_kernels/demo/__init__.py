"""The demo: a teacher trained, sampled faster, and distilled to one step, on real images, on a laptop."""

from __future__ import annotations

from .data import ImageData, load_digits, load_folder
from .run import run_demo
from .settings import Settings

__all__ = ["ImageData", "Settings", "load_digits", "load_folder", "run_demo"]
