"""Noise levels, preconditioning, guidance, schedules, samplers and step skipping."""

from __future__ import annotations

from .noise_levels import edm_weight, karras_sigmas, lognormal_sigmas, loguniform_sigmas, uniform_karras_sigmas
from .online import OnlineSchedule
from .optimize import optimize_schedule
from .precond import EDMPrecond
from .sampling import SampleResult, sample
from .schedule import Schedule
from .skipping import AdaptiveSkip, FixedSkip

__all__ = [
    "AdaptiveSkip",
    "EDMPrecond",
    "FixedSkip",
    "OnlineSchedule",
    "SampleResult",
    "Schedule",
    "edm_weight",
    "karras_sigmas",
    "lognormal_sigmas",
    "loguniform_sigmas",
    "optimize_schedule",
    "sample",
    "uniform_karras_sigmas",
]
