"""Noise levels, preconditioning, guidance, schedules, samplers and step skipping."""

from __future__ import annotations

from .precond import EDMPrecond

__all__ = ["EDMPrecond"]
