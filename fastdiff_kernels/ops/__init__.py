"""The public functions, one module a family."""

from .attention import attention, attention_dual, attention_packed
from .distillation import moment_matching_auxiliary_loss, moment_matching_loss, sim_loss
from .group_norm import group_norm_silu
from .modulate import gate_residual, gate_residual_norm_modulate, layer_norm_modulate, rms_norm_modulate
from .rotary import pixel_norm, qk_norm_rope, qkv_pixel_norm
from .sampling import guided_step, posterior_sample
from .schedule import incremental_cost, integrate_schedule
from .score_matching import denoising_loss, lcss_loss, lcss_noise, lcss_perturb
from .skipping import SolverStep, solver_step, third_order_difference, third_order_skip

__all__ = [
    "SolverStep",
    "attention",
    "attention_dual",
    "attention_packed",
    "denoising_loss",
    "gate_residual",
    "gate_residual_norm_modulate",
    "group_norm_silu",
    "guided_step",
    "incremental_cost",
    "integrate_schedule",
    "layer_norm_modulate",
    "lcss_loss",
    "lcss_noise",
    "lcss_perturb",
    "moment_matching_auxiliary_loss",
    "moment_matching_loss",
    "pixel_norm",
    "posterior_sample",
    "qk_norm_rope",
    "qkv_pixel_norm",
    "rms_norm_modulate",
    "sim_loss",
    "solver_step",
    "third_order_difference",
    "third_order_skip",
]
