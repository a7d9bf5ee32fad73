"""Schedules: what is accepted, the standard shapes, export, plots."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_kernels.diffusion import Schedule


@pytest.mark.parametrize("wrap", [list, tuple, np.array, lambda v: torch.tensor(v, dtype=torch.float64)])
def test_levels_come_as_any_sequence_and_are_kept_in_float64(wrap: object) -> None:
    schedule = Schedule(wrap([4.0, 2.0, 0.1, 0.0]))
    assert schedule.sigmas.dtype == torch.float64
    assert schedule.sigmas.tolist() == [4.0, 2.0, 0.1, 0.0]
    assert schedule.num_steps == 3
    assert schedule.cost is schedule.knots is schedule.length is None
    assert repr(schedule) == "Schedule(3 steps, 4 to 0)"


def test_levels_are_a_copy() -> None:
    levels = torch.tensor([2.0, 1.0], dtype=torch.float64)
    schedule = Schedule(levels)
    levels[0] = 5.0
    assert schedule.sigmas[0] == 2.0


@pytest.mark.parametrize(
    ("sigmas", "error", "message"),
    [
        ([1.0, 1.0, 0.0], ValueError, "strictly decreasing, got 1.0 then 1.0 at position 0"),
        ([2.0, 1.0, 1.5], ValueError, "strictly decreasing, got 1.0 then 1.5 at position 1"),
        ([1.0, 0.0, 0.0], ValueError, "strictly decreasing"),
        ([1.0, -0.5], ValueError, "must not be negative"),
        ([float("inf"), 1.0], ValueError, "must be finite"),
        ([float("nan"), 1.0], ValueError, "must be finite"),
        ([1.0], ValueError, "at least two levels, got 1"),
        ([], ValueError, "at least two levels, got 0"),
        ([[2.0, 1.0]], ValueError, r"one-dimensional, got shape \[1, 2\]"),
        (3.0, ValueError, "one-dimensional"),
        ("sigmas", TypeError, "sigmas must be a sequence of numbers"),
        (None, TypeError, "sigmas must be a sequence of numbers"),
    ],
)
def test_bad_levels_are_named(sigmas: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule(sigmas)


def test_costs_come_with_their_knots() -> None:
    schedule = Schedule([4.0, 1.0, 0.0], knots=[4.0, 2.0, 1.0], cost=[9.0, 16.0])
    assert schedule.length == 7.0
    with pytest.raises(ValueError, match="knots and cost come together, got only knots"):
        Schedule([4.0, 1.0], knots=[4.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="one entry for each of the 2 intervals of knots, got 3"):
        Schedule([4.0, 1.0], knots=[4.0, 2.0, 1.0], cost=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="cost must be finite and not negative"):
        Schedule([4.0, 1.0], knots=[4.0, 2.0, 1.0], cost=[1.0, -1.0])


@given(st.integers(1, 200), st.floats(1e-4, 1.0), st.floats(1.1, 1e4), st.floats(0.5, 100.0))
def test_karras_levels_are_affine_in_the_root(num_steps: int, sigma_min: float, ratio: float, rho: float) -> None:
    sigma_max = sigma_min * ratio
    sigmas = Schedule.karras(num_steps, sigma_min, sigma_max, rho).sigmas
    assert sigmas[0] == sigma_max
    assert sigmas[-1] == 0
    assert len(sigmas) == num_steps + 1
    if num_steps > 1:
        assert sigmas[-2] == sigma_min
        roots = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps)
        np.testing.assert_allclose(sigmas[:-1].numpy() ** (1 / rho), roots, rtol=1e-12)


def test_karras_rho_7_spacing() -> None:
    """EDM's 18 levels, as its sampler visits them: [(80^(1/7) + i/17 (.002^(1/7) - 80^(1/7)))^7]."""
    sigmas = Schedule.karras(18, 0.002, 80.0).sigmas
    steps = -sigmas.diff()[:-1]
    assert sigmas[1] == pytest.approx(57.586, abs=1e-3)
    assert (steps.diff() < 0).all()


def test_log_uniform_levels_have_one_ratio() -> None:
    sigmas = Schedule.log_uniform(5, 0.01, 100.0).sigmas
    np.testing.assert_allclose(sigmas.numpy(), [100.0, 10.0, 1.0, 0.1, 0.01, 0.0], rtol=1e-12)


def test_scaled_linear_ends_are_stable_diffusions() -> None:
    sigmas = Schedule.scaled_linear(50).sigmas
    assert sigmas[0] == pytest.approx(14.6146, abs=1e-4)
    assert sigmas[-2] == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1] == 0


def _relative_second_differences(schedule: Schedule) -> torch.Tensor:
    d = -schedule.sigmas[:-1].diff()
    return ((d[2:] + d[:-2]) / 2 - d[1:-1]).abs() / d[1:-1]


def test_how_straight_the_standard_grids_are() -> None:
    """Within a run of reuses AdaptiveDiffusion's criterion sees the grid alone: 79 % of this grid passes .01, and .004 to .064 on that."""
    assert (_relative_second_differences(Schedule.scaled_linear(50)) <= 0.01).double().mean() == pytest.approx(0.79, abs=0.005)
    karras = _relative_second_differences(Schedule.karras(50, 0.002, 80.0))
    assert karras.min() == pytest.approx(0.004, abs=5e-4)
    assert karras.max() == pytest.approx(0.064, abs=5e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule.karras(0, 0.1, 1.0), "num_steps must be at least 1"),
        (lambda: Schedule.karras(4, 1.0, 1.0), "sigma_min must be below sigma_max"),
        (lambda: Schedule.karras(4, 0.0, 1.0), "sigma_min must be positive"),
        (lambda: Schedule.karras(4, 0.1, float("inf")), "sigma_max must be positive and finite"),
        (lambda: Schedule.karras(4, 0.1, 1.0, rho=0), "rho must be positive"),
        (lambda: Schedule.log_uniform(0, 0.1, 1.0), "num_steps must be at least 1"),
        (lambda: Schedule.scaled_linear(0), "num_steps must be at least 1"),
        (lambda: Schedule.scaled_linear(5, beta_start=0.1, beta_end=0.05), "beta_start < beta_end < 1"),
        (lambda: Schedule.scaled_linear(5, train_steps=1), "train_steps must be at least 2"),
    ],
)
def test_bad_shapes_of_schedule_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_num_steps_must_be_an_int() -> None:
    with pytest.raises(TypeError, match="num_steps must be an int, got float"):
        Schedule.karras(4.0, 0.1, 1.0)


def test_k_diffusion_gets_the_levels_in_its_dtype() -> None:
    schedule = Schedule.karras(10, 0.002, 80.0)
    sigmas = schedule.to_k_diffusion()
    assert sigmas.dtype == torch.float32
    assert torch.equal(sigmas, schedule.sigmas.float())
    with pytest.raises(ValueError, match=r"no longer strictly decreasing once rounded to torch\.bfloat16"):
        Schedule([1.001, 1.0, 0.0]).to_k_diffusion(dtype=torch.bfloat16)


def test_edm_gets_the_levels_in_float64() -> None:
    schedule = Schedule.karras(10, 0.002, 80.0)
    steps = schedule.to_edm()
    assert torch.equal(steps, schedule.sigmas)
    steps.zero_()
    assert schedule.sigmas[0] == 80.0


def test_flow_matching_times() -> None:
    np.testing.assert_allclose(Schedule([3.0, 1.0, 0.25, 0.0]).to_flow_matching().sigmas, [0.75, 0.5, 0.2, 0.0], rtol=1e-15)


def test_plot_shows_the_levels_and_the_speed_they_even_out() -> None:
    plain = Schedule.karras(6, 0.1, 10.0).plot()
    assert len(plain.axes) == 1
    assert len(plain.axes[0].lines[0].get_ydata()) == 6
    optimised = Schedule([4.0, 1.0, 0.0], knots=[4.0, 2.0, 1.0], cost=[9.0, 16.0]).plot()
    np.testing.assert_allclose(optimised.axes[1].lines[0].get_ydata(), np.array([3.0, 4.0]) / np.log(2))


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"fastdiff-kernels\[train\]"):
        Schedule.karras(6, 0.1, 10.0).plot()
