"""Schedules put into diffusers' schedulers: what goes in and what is refused, on stand-ins that treat `sigmas` as those document it.

tests/integrations does the same with the schedulers themselves."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdiff_kernels.diffusion import Schedule

LEVELS = [80.0, 10.0, 1.0, 0.1, 0.002, 0.0]
TIMES = [1.0, 0.75, 0.5, 0.25, 0.0]


class EDMEulerScheduler:
    """Reads `sigmas`, a tensor, as a ramp from its sigma_max (0) to its sigma_min (1)."""

    def __init__(self, **config: object) -> None:
        defaults = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_schedule": "karras", "final_sigmas_type": "zero"}
        self.config = SimpleNamespace(**{**defaults, **config})

    def set_timesteps(self, *, sigmas: torch.Tensor) -> None:
        low, high = self.config.sigma_min ** (1 / self.config.rho), self.config.sigma_max ** (1 / self.config.rho)
        levels = (high + sigmas.to(torch.float64) * (low - high)) ** self.config.rho
        self.sigmas = torch.cat((levels.float(), torch.zeros(1)))
        self.timesteps = levels.log() / 4


class EulerDiscreteScheduler:
    """Takes `sigmas`, a list, as it is; the last is where it ends."""

    def __init__(self, **config: object) -> None:
        self.config = SimpleNamespace(**{"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, **config})

    def set_timesteps(self, *, sigmas: list[float]) -> None:
        self.sigmas = torch.from_numpy(np.array(sigmas).astype(np.float32))
        self.timesteps = self.sigmas[:-1]


class FlowMatchEulerDiscreteScheduler:
    """Shifts `sigmas`, a list, and appends 0."""

    def __init__(self, shift: float = 1.0, **config: object) -> None:
        defaults = {"shift": shift, "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None}
        self.config = SimpleNamespace(**{**defaults, **config})
        self.shift = shift

    def set_timesteps(self, *, sigmas: list[float]) -> None:
        times = np.array(sigmas).astype(np.float32)
        times = self.shift * times / (1 + (self.shift - 1) * times)
        self.sigmas = torch.cat((torch.from_numpy(times).float(), torch.zeros(1)))
        self.timesteps = 1000 * times


class DDIMScheduler:
    config = SimpleNamespace()


def held(scheduler: object) -> list[float]:
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize("config", [{}, {"rho": 3.0}, {"sigma_min": 0.1, "sigma_max": 20.0}])
def test_edm_euler_holds_the_levels_after_its_ramp(config: dict[str, float]) -> None:
    scheduler = EDMEulerScheduler(**config)
    arguments = Schedule(LEVELS).to_diffusers(scheduler)
    np.testing.assert_allclose(held(scheduler), LEVELS, rtol=1e-6)
    assert isinstance(arguments["sigmas"], torch.Tensor)
    again = EDMEulerScheduler(**config)
    again.set_timesteps(**arguments)
    assert held(again) == held(scheduler)


def test_euler_discrete_gets_the_final_zero() -> None:
    scheduler = EulerDiscreteScheduler()
    assert Schedule(LEVELS).to_diffusers(scheduler) == {"sigmas": LEVELS}
    np.testing.assert_allclose(held(scheduler), LEVELS, rtol=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_matching_holds_the_times_after_its_shift(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift)
    Schedule(TIMES).to_diffusers(scheduler)
    np.testing.assert_allclose(held(scheduler), TIMES, rtol=1e-6)


def test_levels_of_a_ve_schedule_reach_flow_matching_as_times() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(3.0)
    schedule = Schedule.karras(8, 0.02, 80.0)
    with pytest.raises(ValueError, match=r"times within \[0, 1\] and the first here is 80; use to_flow_matching"):
        schedule.to_diffusers(scheduler)
    schedule.to_flow_matching().to_diffusers(scheduler)
    sigmas = schedule.sigmas.numpy()
    np.testing.assert_allclose(held(scheduler), sigmas / (1 + sigmas), rtol=1e-6)


def test_subclasses_are_known_by_their_base() -> None:
    class Custom(EulerDiscreteScheduler):
        pass

    scheduler = Custom()
    Schedule(LEVELS).to_diffusers(scheduler)
    assert len(scheduler.sigmas) == 6


@pytest.mark.parametrize(
    ("scheduler", "sigmas", "message"),
    [
        (EDMEulerScheduler(sigma_schedule="exponential"), LEVELS, "sigma_schedule='exponential' ignores the levels"),
        (EDMEulerScheduler(final_sigmas_type="sigma_min"), LEVELS, "final_sigmas_type='sigma_min' repeats the last level"),
        (EDMEulerScheduler(), LEVELS[:-1], "appends a final 0 and the schedule ends at 0.002"),
        (EulerDiscreteScheduler(use_karras_sigmas=True), LEVELS, "use_karras_sigmas=True replaces the levels"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), TIMES, "use_dynamic_shifting=True replaces the levels"),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), TIMES, "shift_terminal=0.1 replaces the levels"),
        (FlowMatchEulerDiscreteScheduler(), TIMES[:-1], "appends a final 0 and the schedule ends at 0.25"),
    ],
)
def test_configurations_that_cannot_hold_the_levels_are_refused(scheduler: object, sigmas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(sigmas).to_diffusers(scheduler)
    assert not hasattr(scheduler, "sigmas")


def test_other_schedulers_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"EDMEulerScheduler, .*, UniPCMultistepScheduler, got DDIMScheduler"):
        Schedule(LEVELS).to_diffusers(DDIMScheduler())


def test_a_scheduler_that_ends_up_elsewhere_is_reported() -> None:
    class Moved(EulerDiscreteScheduler):
        def set_timesteps(self, *, sigmas: list[float]) -> None:
            super().set_timesteps(sigmas=sigmas[:-1])

    with pytest.raises(RuntimeError, match=r"Moved was set to .* this version is not supported"):
        Schedule(LEVELS).to_diffusers(Moved())


def test_levels_on_one_timestep_are_refused() -> None:
    class Coarse(EulerDiscreteScheduler):
        def set_timesteps(self, *, sigmas: list[float]) -> None:
            super().set_timesteps(sigmas=sigmas)
            self.timesteps = self.sigmas[:-1].clamp(max=1.0)

    with pytest.raises(ValueError, match="the levels 80 and 10 both lie at its timestep 1"):
        Schedule(LEVELS).to_diffusers(Coarse())


def test_fastgen_gets_a_list() -> None:
    assert Schedule(LEVELS).to_fastgen() == LEVELS
