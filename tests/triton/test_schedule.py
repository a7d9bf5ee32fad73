"""Triton kernels of the schedule family against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_kernels.reference import schedule as definition
from fastdiff_kernels.triton import _sums, schedule
from tests.helpers import FLOATS, assert_bitwise, assert_within_eager
from tests.triton.accuracy import check, constants, normals
from tests.triton.drawing import few_examples, laid_out, shapes
from tests.triton.running import check_budgets, run_interpreted


def levels_of(batch, low, high, device):
    return (torch.linspace(*ends, batch, dtype=torch.float64, device=device) for ends in (low, high))


@pytest.mark.executes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 3), (3, 4, 5, 7), (2, 2 * _sums.CHUNK + 1), (4,), (0, 5), (2, 0)])
def test_cost_is_as_accurate_as_the_definition(shape, dtype, device):
    inputs = [torch.randn(shape, device=device).to(dtype) for _ in range(3)]
    low, high = levels_of(shape[0], (0.02, 0.3), (0.5, 4.0), device)
    cost = schedule.incremental_cost(*inputs, low, high, 0.7)
    eager = definition.incremental_cost(*inputs, low, high, 0.7)
    assert cost.dtype == eager.dtype
    if dtype == torch.float64:
        torch.testing.assert_close(cost, eager, rtol=1e-12, atol=0, equal_nan=True)
    else:
        assert_within_eager(cost, eager, definition.incremental_cost(*[x.double() for x in inputs], low, high, 0.7))


@pytest.mark.executes
def test_cost_with_common_levels_does_not_depend_on_the_batch(device):
    inputs = [torch.randn(3, _sums.CHUNK + 5, device=device) for _ in range(3)]
    low, high = (torch.full((1,), sigma, dtype=torch.float64, device=device) for sigma in (0.1, 0.2))
    whole = schedule.incremental_cost(*inputs, low, high, 0.5)
    assert_bitwise(schedule.incremental_cost(*[x[1:2] for x in inputs], low, high, 0.5), whole[1:2])


@pytest.mark.executes
@pytest.mark.parametrize("interpolation", ["pchip", "linear"])
@pytest.mark.parametrize(("intervals", "steps"), [(1, 1), (1, 5), (2, 9), (3, 1), (100, 300), (2500, 18)])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_levels_are_those_of_the_definition(intervals, steps, interpolation, dtypes, device):
    knots = torch.rand(2, 2, intervals + 1, dtype=torch.float64).add(0.1).cumsum(-1)
    knots[0] = knots[0].flip(-1)
    costs = torch.rand(2, 2, intervals, dtype=torch.float64).square()
    sigmas, costs = knots.to(device, dtypes[0]), costs.to(device, dtypes[1])
    levels = schedule.integrate_schedule(sigmas, costs, steps, interpolation)
    assert levels.dtype == dtypes[0]
    torch.testing.assert_close(levels, definition.integrate_schedule(sigmas, costs, steps, interpolation))
    torch.testing.assert_close(levels[..., [0, -1]], sigmas[..., [0, -1]], rtol=0, atol=0)


@pytest.mark.executes
def test_bad_schedules_come_back_as_nan_and_good_ones_beside_them_do_not(device):
    sigmas = torch.tensor([[1.0, 2, 3], [1, 2, 2], [1, 3, 2], [1, 2, torch.inf], [1, 2, 3], [1, 2, 3], [1, 2, 3]], device=device)
    costs = torch.tensor([[1.0, 4], [1, 1], [1, 1], [1, 1], [0, 0], [1, -1], [1, torch.nan]], device=device)
    levels = schedule.integrate_schedule(sigmas, costs, 4, "pchip")
    assert levels[0].isfinite().all()
    assert levels[1:].isnan().all()
    assert_bitwise(levels.isnan(), definition.integrate_schedule(sigmas, costs, 4).isnan())
    assert schedule.integrate_schedule(sigmas[:0], costs[:0], 4, "pchip").shape == (0, 5)


@pytest.mark.executes
@few_examples
@given(shape=shapes, permuted=st.booleans(), common=st.tuples(*[st.booleans()] * 2), sigma_data=st.floats(0.1, 3))
def test_cost_of_any_shape_layout_and_form_of_levels(shape, permuted, common, sigma_data, device):
    inputs = [laid_out(t, permuted) for t in normals(shape, torch.float64, device, 3)]
    low, high = constants(shape[0], torch.float64, device, [1 if one else shape[0] for one in common])
    check(schedule, "incremental_cost", (*inputs, low, 4 * high, sigma_data))


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_compiles_within_its_budget(monkeypatch):
    long, short = torch.zeros(2, 3 * _sums.CHUNK), torch.zeros(2, 64, dtype=torch.float64)
    sigma = torch.ones(2, dtype=torch.float64)
    sigmas, costs = torch.zeros(2, 257), torch.zeros(2, 256, dtype=torch.float64)
    cases = {
        "cost float32, long": lambda: schedule.incremental_cost(long, long, long, sigma, sigma[:1], 0.5),
        "cost float64, short": lambda: schedule.incremental_cost(short, short, short, sigma, sigma, 0.5),
        "pchip": lambda: schedule.integrate_schedule(sigmas, costs, 18, "pchip"),
        "linear, one interval": lambda: schedule.integrate_schedule(sigmas[:, :2], costs[:, :1], 1, "linear"),
    }
    check_budgets("schedule", cases, monkeypatch)
