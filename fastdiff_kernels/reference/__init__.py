"""The definition of every op in plain PyTorch: differentiable, in float64 on request, traceable."""

from . import attention, distillation, group_norm, modulate, philox, rotary, sampling, schedule, score_matching, skipping

__all__ = ["attention", "distillation", "group_norm", "modulate", "philox", "rotary", "sampling", "schedule", "score_matching", "skipping"]
