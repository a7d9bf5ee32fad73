"""Setting diffusers' schedulers to given noise levels. diffusers is not imported: its schedulers are known by class name."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

# Options that put other levels in place of those handed to `set_timesteps`.
_OVERRIDES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_dynamic_shifting", "invert_sigmas", "shift_terminal")


def set_diffusers_schedule(scheduler: Any, sigmas: Tensor) -> dict[str, object]:
    """What `Schedule.to_diffusers` documents; sigmas float64 [num_steps + 1]."""
    names = {base.__name__ for base in type(scheduler).__mro__}
    convert = next((convert for name, convert in _CONVERTERS.items() if name in names), None)
    if convert is None:
        raise TypeError(
            f"scheduler must be one of {', '.join(_CONVERTERS)}, got {type(scheduler).__name__}: "
            "the other schedulers take integer timesteps or no levels at all, and cannot be set to these exactly"
        )
    if "set_timesteps" in vars(scheduler):
        del scheduler.set_timesteps  # an earlier schedule's
    arguments = convert(scheduler, sigmas)
    scheduler.set_timesteps(**arguments)
    _check_outcome(scheduler, sigmas)
    return arguments


def _edm_euler(scheduler: Any, sigmas: Tensor) -> dict[str, object]:
    config = scheduler.config
    _refuse(scheduler, config.sigma_schedule != "karras", f"sigma_schedule={config.sigma_schedule!r} ignores the levels it is given")
    _refuse(scheduler, config.final_sigmas_type != "zero", f"final_sigmas_type={config.final_sigmas_type!r} repeats the last level")
    levels = _without_final_zero(scheduler, sigmas)
    inverse = 1 / config.rho
    low, high = config.sigma_min**inverse, config.sigma_max**inverse
    return {"sigmas": (levels**inverse - high) / (low - high)}


def _euler_discrete(scheduler: Any, sigmas: Tensor) -> dict[str, object]:
    _refuse_overrides(scheduler)
    return {"sigmas": sigmas.tolist()}


def _flow_match_euler(scheduler: Any, sigmas: Tensor) -> dict[str, object]:
    _refuse_overrides(scheduler)
    _refuse(
        scheduler, sigmas[0] > 1, f"its levels are times within [0, 1] and the first here is {sigmas[0]:.6g}; use to_flow_matching() first"
    )
    levels = _without_final_zero(scheduler, sigmas)
    shift = scheduler.shift if hasattr(scheduler, "shift") else scheduler.config.shift
    return {"sigmas": (levels / (shift - (shift - 1) * levels)).tolist()}


def _multistep(scheduler: Any, sigmas: Tensor) -> dict[str, object]:
    """These take integer timesteps at most, so that `set_timesteps` of this one scheduler is made to write the levels themselves."""
    config, flow = scheduler.config, getattr(scheduler.config, "use_flow_sigmas", False)
    _refuse(
        scheduler,
        sigmas[-1] == 0 and config.final_sigmas_type != "zero",
        f"with final_sigmas_type={config.final_sigmas_type!r} it makes a step of higher order to the final 0, which has no log SNR",
    )
    if flow:
        _refuse(scheduler, sigmas[0] >= 1, f"its levels are times below 1 and the first here is {sigmas[0]:.6g}; see to_flow_matching()")
        timesteps = sigmas[:-1] * config.num_train_timesteps
    else:
        timesteps = _table_times(scheduler, sigmas[:-1])
    scheduler.fastdiff_schedule = (sigmas.float(), timesteps.float())
    scheduler.set_timesteps = MethodType(_set_levels, scheduler)
    return {"num_inference_steps": len(sigmas) - 1}


def _set_levels(self: Any, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
    """The host's `set_timesteps`, with the levels and times of a Schedule in place of its own."""
    sigmas, timesteps = self.fastdiff_schedule
    if num_inference_steps is not None and num_inference_steps != len(timesteps):
        raise ValueError(f"num_inference_steps must be {len(timesteps)}, as the schedule has, got {num_inference_steps}")
    type(self).set_timesteps(self, len(timesteps), device=device)
    self.sigmas, self.timesteps = sigmas.clone(), timesteps.to(device)
    self.num_inference_steps = len(timesteps)


def _table_times(scheduler: Any, sigmas: Tensor) -> Tensor:
    """Where ln sigma lies in the scheduler's table, linearly between integer timesteps and within its ends."""
    abar = scheduler.alphas_cumprod.detach().to(device="cpu", dtype=torch.float64)
    table = ((1 - abar) / abar).log() / 2  # [T], rising
    low = (torch.searchsorted(table, sigmas.log()) - 1).clamp(0, len(table) - 2)
    return low + ((sigmas.log() - table[low]) / (table[low + 1] - table[low])).clamp(0, 1)


_CONVERTERS = {
    "EDMEulerScheduler": _edm_euler,
    "EulerDiscreteScheduler": _euler_discrete,
    "FlowMatchEulerDiscreteScheduler": _flow_match_euler,
    "DPMSolverMultistepScheduler": _multistep,
    "UniPCMultistepScheduler": _multistep,
}


def _without_final_zero(scheduler: Any, sigmas: Tensor) -> Tensor:
    _refuse(scheduler, sigmas[-1] > 0, f"it appends a final 0 and the schedule ends at {sigmas[-1]:.6g}")
    return sigmas[:-1]


def _refuse_overrides(scheduler: Any) -> None:
    for option in _OVERRIDES:
        value = getattr(scheduler.config, option, None)
        _refuse(scheduler, bool(value), f"{option}={value!r} replaces the levels it is given")


def _refuse(scheduler: Any, condition: object, reason: str) -> None:
    if condition:
        raise ValueError(f"scheduler ({type(scheduler).__name__}) cannot represent the schedule: {reason}")


def _check_outcome(scheduler: Any, sigmas: Tensor) -> None:
    held = torch.as_tensor(scheduler.sigmas).detach().to(device="cpu", dtype=torch.float64)
    # Schedulers keep float32 and go through a few operations in it.
    if held.shape != sigmas.shape or not torch.allclose(held, sigmas, rtol=1e-5, atol=0):
        raise RuntimeError(
            f"{type(scheduler).__name__} was set to {sigmas.tolist()} and holds {held.tolist()}: this version is not supported"
        )
    times = torch.as_tensor(scheduler.timesteps).detach().cpu()
    # Steps are found by their timestep; of two alike the scheduler takes the second, and thereby leaves a step out.
    same = (times.diff() == 0).nonzero()
    if len(same):
        at = int(same[0])
        raise ValueError(
            f"scheduler ({type(scheduler).__name__}) cannot represent the schedule: the levels {sigmas[at]:.6g} and {sigmas[at + 1]:.6g} "
            f"both lie at its timestep {times[at]:.6g}; its own range is what the model was trained on"
        )
