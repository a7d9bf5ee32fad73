"""OnlineSchedule: burn-in, turns of the intervals, levels that move towards the costs, and checkpoints."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff_kernels.diffusion import EDMPrecond, OnlineSchedule

from .oracles import GaussianNetwork, gaussian_length, geodesic


class Counting(EDMPrecond):
    """Exact for data N(0, c^2), counting calls."""

    def __init__(self, c: float) -> None:
        super().__init__(GaussianNetwork(c))
        self.calls = 0

    def raw(self, x: Tensor, sigma: Tensor, **conditioning: object) -> Tensor:
        self.calls += 1
        assert not torch.is_grad_enabled()
        return super().raw(x, sigma, **conditioning)


def test_burn_in_calls_no_network_and_moves_nothing() -> None:
    online, denoiser = OnlineSchedule(6, sigma_min=0.1, sigma_max=10.0, knots=5, burn_in=7, min_visits=1), Counting(0.5)
    start = online.levels.clone()
    assert [online.observe(denoiser, torch.randn(8, 4)) for _ in range(7)] == [False] * 7
    assert denoiser.calls == 0
    assert torch.equal(online.levels, start)
    assert start.log().diff().numpy() == pytest.approx(np.full(5, -math.log(100) / 5))


def test_levels_move_after_every_interval_had_its_turns() -> None:
    online, denoiser = OnlineSchedule(6, sigma_min=0.1, sigma_max=10.0, knots=5, burn_in=2, min_visits=3), Counting(0.5)
    moved = [online.observe(denoiser, torch.randn(8, 4)) for _ in range(2 + 24)]
    assert [i for i, m in enumerate(moved) if m] == [13, 25]
    assert denoiser.calls == 24
    assert online.moves == 2


@pytest.mark.parametrize("damping", [1.0, 0.3])
def test_levels_reach_the_geodesic_and_damping_is_the_share_of_the_way(damping: float) -> None:
    online = OnlineSchedule(9, sigma_min=0.05, sigma_max=20.0, knots=128, burn_in=0, min_visits=1, damping=damping)
    denoiser, start = Counting(0.5), online.levels.log()
    exact = torch.tensor(geodesic(gaussian_length(0.5), 8, 0.05, 20.0), dtype=torch.float64).log()
    clean = 0.5 * torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    for moves in range(1, 5):
        for _ in range(127):
            online.observe(denoiser, clean)
        expected = exact + (1 - damping) ** moves * (start - exact)
        assert online.moves == moves
        assert (online.levels.log() - expected).abs().max() < 2e-2
    schedule = online.schedule
    assert schedule.sigmas[[0, -2, -1]].tolist() == [20.0, 0.05, 0.0]


def test_levels_to_train_at_follow_the_schedule() -> None:
    online = OnlineSchedule(4, sigma_min=0.1, sigma_max=10.0)
    online.levels = torch.tensor([10.0, 5.0, 0.2, 0.1], dtype=torch.float64)
    drawn = online.draw(30_000, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert drawn.min() > 0.0999
    assert drawn.max() <= 10.0
    shares = [float(((drawn >= low) & (drawn < high)).float().mean()) for high, low in ((10.0, 5.0), (5.0, 0.2), (0.2, 0.1))]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.015)
    middle = drawn[(drawn >= 0.2) & (drawn < 5.0)].log()
    assert float(middle.mean()) == pytest.approx(math.log(1.0), abs=0.05)
    assert online.draw(0).shape == (0,)


def test_checkpoint_takes_up_levels_and_counts() -> None:
    def make() -> OnlineSchedule:
        return OnlineSchedule(6, sigma_min=0.1, sigma_max=10.0, knots=5, burn_in=1, min_visits=1)

    first, second, denoiser = make(), make(), Counting(0.5)
    for _ in range(9):
        first.observe(denoiser, torch.randn(8, 4))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.levels, first.levels)
    assert second.steps == 9
    first.observe(denoiser, torch.ones(8, 4))
    second.observe(denoiser, torch.ones(8, 4))
    states = first.state_dict()["estimate"], second.state_dict()["estimate"]
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][name])) for name, value in states[0].items())
    clean = torch.randn(8, 4)
    for _ in range(4):
        assert first.observe(denoiser, clean) == second.observe(denoiser, clean)
    assert torch.equal(second.levels, first.levels)
    with pytest.raises(ValueError, match=r"state: levels must be 6 from 10 to 0.1; got 7 from 10"):
        second.load_state_dict(OnlineSchedule(7, sigma_min=0.1, sigma_max=10.0, knots=5).state_dict())


@pytest.mark.parametrize(("name", "value"), [("burn_in", 7), ("min_visits", 9), ("damping", 0.3), ("interpolation", "linear"), ("seed", 2)])
def test_a_state_of_other_arguments_is_refused_and_changes_nothing(name: str, value: object) -> None:
    make = partial(OnlineSchedule, 6, sigma_min=0.1, sigma_max=10.0, knots=5)
    state, other = make().state_dict(), make(**{name: value})
    levels = other.levels
    with pytest.raises(ValueError, match=rf"state: {name} must be {value!r}; got "):
        other.load_state_dict(state)
    assert other.levels is levels
    del state[name]
    with pytest.raises(ValueError, match=f"state: must hold {name} too"):
        other.load_state_dict(state)


def test_costs_that_are_not_finite_are_reported() -> None:
    class Broken:
        sigma_data = 0.5

        def raw(self, x: Tensor, sigma: Tensor) -> Tensor:
            return torch.full_like(x, torch.nan)

    online = OnlineSchedule(4, sigma_min=0.1, sigma_max=10.0, knots=3, burn_in=0)
    online.observe(Broken(), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"denoiser.raw gives a cost of nan between sigma 10 and 1"):
        online.observe(Broken(), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_steps": 1}, ValueError, "num_steps must be at least 2"),
        ({"sigma_min": 20.0}, ValueError, "sigma_min must be below sigma_max"),
        ({"knots": 2}, ValueError, "knots must be at least 3"),
        ({"burn_in": -1}, ValueError, "burn_in must be at least 0"),
        ({"min_visits": 0}, ValueError, "min_visits must be at least 1"),
        ({"damping": 1.5}, ValueError, "damping must be finite and > 0 and <= 1, got 1.5"),
        ({"interpolation": "cubic"}, ValueError, "interpolation must be one of"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"num_steps": 4, "sigma_min": 0.1, "sigma_max": 10.0, **change}
    with pytest.raises(error, match=message):
        OnlineSchedule(arguments.pop("num_steps"), **arguments)


def test_data_must_be_samples() -> None:
    online = OnlineSchedule(4, sigma_min=0.1, sigma_max=10.0, burn_in=0)
    with pytest.raises(TypeError, match=r"denoiser must offer .raw"):
        online.observe(lambda x, sigma: x, torch.ones(2, 3))
    with pytest.raises(TypeError, match="data must be float32 or float64"):
        online.observe(Counting(0.5), torch.ones(2, 3).half())
