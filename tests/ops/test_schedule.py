"""Costs of intervals between noise levels, and the schedules that share them evenly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import PchipInterpolator

from fastdiff_kernels import backend, ops

from ..helpers import FLOATS, assert_bitwise, assert_independent_of_batch, assert_independent_of_threads, assert_within_eager

NARROW = (torch.float32, torch.bfloat16, torch.float16)
INTERPOLATIONS = pytest.mark.parametrize("interpolation", ["pchip", "linear"])
# A chunk of the solver has 1024 intervals.
SIZES = [(1, 1), (1, 7), (2, 1), (2, 5), (3, 10), (255, 18), (1024, 40), (1025, 3000), (20_000, 18)]


def network_outputs(*shape, dtype=torch.float32):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(3)]


def eager_cost(x, raw_low, raw_high, sigma_low, sigma_high, sigma_data=0.5):
    """As the formula stands: two scores and their difference, in the inputs' dtype."""

    def score(raw, sigma):
        sigma = sigma.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        variance = sigma**2 + sigma_data**2
        return sigma_data / (sigma * variance.sqrt()) * raw - x / variance

    difference = score(raw_low, sigma_low) - score(raw_high, sigma_high)
    return sigma_low.to(x.dtype) ** 2 * (difference**2).reshape(len(x), -1).sum(1)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4, 7, 3), (2, 16385), (6,)])
def test_cost_is_as_accurate_as_eager(shape, dtype):
    inputs = network_outputs(*shape, dtype=dtype)
    low = torch.rand(shape[0], dtype=torch.float64) + 0.5
    high = low + torch.rand(shape[0], dtype=torch.float64)
    truth = eager_cost(*[x.double() for x in inputs], low, high)
    cost = ops.incremental_cost(*inputs, low, high)
    assert cost.dtype == torch.float32
    assert_within_eager(cost, eager_cost(*inputs, low, high), truth)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    transposed=st.booleans(),
    sigma_low=st.floats(0.01, 50),
    ratio=st.floats(1.0, 10),
    sigma_data=st.floats(0.1, 3),
)
def test_cost_of_any_shape_layout_and_level(shape, transposed, sigma_low, ratio, sigma_data):
    inputs = network_outputs(*shape, dtype=torch.float64)
    if transposed:
        inputs = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    low, high = (torch.tensor([sigma], dtype=torch.float64) for sigma in (sigma_low, ratio * sigma_low))
    cost = ops.incremental_cost(*inputs, low.item(), high.item(), sigma_data=sigma_data)
    expected = eager_cost(*inputs, low, high, sigma_data)
    # Scores of nearly equal outputs cancel in the expected value.
    scale = sum(eager_cost(x, low_raw, high_raw, low, high, sigma_data) for x, low_raw, high_raw in _one_at_a_time(inputs))
    assert ((cost - expected).abs() <= 1e-12 * scale).all()


def _one_at_a_time(inputs):
    return [[y if i == j else torch.zeros_like(y) for j, y in enumerate(inputs)] for i in range(3)]


def gaussian_outputs(low, high, deviation):
    """x ~ p_high for data N(0, c^2 I), the outputs F whose scores are exact there, and the cost in closed form."""
    x = math.hypot(high, deviation) * torch.randn(4, 300, dtype=torch.float64)
    variances = [sigma**2 + deviation**2 for sigma in (low, high)]
    raws = [
        (x / (sigma**2 + 0.25) - x / variance) * sigma * math.sqrt(sigma**2 + 0.25) / 0.5
        for sigma, variance in zip((low, high), variances, strict=True)
    ]
    return (x, *raws), low**2 * (x * (1 / variances[0] - 1 / variances[1])).square().sum(1)


@pytest.mark.parametrize("deviation", [0.3, 0.5, 2.0])
@pytest.mark.parametrize(("low", "high"), [(0.002, 0.0025), (0.9, 1.2), (20.0, 80.0)])
def test_cost_of_gaussian_data_is_the_closed_form(low, high, deviation):
    """With exact scores of N(0, c^2 I) it is sigma_low^2 |x|^2 (1/V_low - 1/V_high)^2, down to levels where D has lost the difference."""
    outputs, exact = gaussian_outputs(low, high, deviation)
    torch.testing.assert_close(ops.incremental_cost(*outputs, low, high), exact, rtol=1e-8, atol=0)


@pytest.mark.parametrize(("low", "high", "error"), [(0.002, 0.0025, 3e-3), (0.02, 0.025, 3e-5), (0.2, 0.25, 1e-6)])
def test_cost_in_float32_at_low_noise(low, high, error):
    """Formed from float32 values of D / sigma^2 it would be wrong by a factor of 10^4 at the lowest levels."""
    outputs, exact = gaussian_outputs(low, high, 0.3)
    torch.testing.assert_close(ops.incremental_cost(*[o.float() for o in outputs], low, high).double(), exact, rtol=error, atol=0)


def test_cost_keeps_the_levels_of_a_fine_grid_apart():
    """Levels a millionth apart: rounded to float32 first, their difference would be wrong by percents."""
    x, zero = torch.ones(1, 4), torch.zeros(1, 4)
    low, high = 2.0, 2.0 * (1 + 1e-6)
    exact = 4 * low**2 * (1 / (low**2 + 0.25) - 1 / (high**2 + 0.25)) ** 2
    wide = [torch.tensor(sigma, dtype=torch.float64) for sigma in (low, high)]
    assert ops.incremental_cost(x, zero, zero, low, high).item() == pytest.approx(exact, rel=1e-5)
    assert ops.incremental_cost(x, zero, zero, *wide).item() == pytest.approx(exact, rel=1e-5)


def test_cost_takes_levels_in_every_form():
    inputs = network_outputs(3, 20)
    expected = ops.incremental_cost(*inputs, 0.5, 2.0)
    for low, high in ((torch.tensor(0.5), torch.tensor(2.0)), (torch.full((3,), 0.5), 2.0), (0.5, torch.full((3,), 2.0).double())):
        assert_bitwise(ops.incremental_cost(*inputs, low, high), expected)


def test_cost_of_equal_levels_and_outputs_is_zero():
    x, raw, _ = network_outputs(3, 20)
    assert_bitwise(ops.incremental_cost(x, raw, raw, 0.7, 0.7), torch.zeros(3))


@pytest.mark.parametrize("dtype", FLOATS)
def test_cost_is_reproducible(dtype):
    inputs = network_outputs(3, 40_001, dtype=dtype)
    assert_independent_of_batch(lambda *xs: ops.incremental_cost(*xs, 0.1, 0.2), *inputs)
    assert_independent_of_threads(lambda: ops.incremental_cost(*inputs, 0.1, 0.2))


def test_cost_lets_nan_through_and_takes_empty_batches():
    x, low, high = network_outputs(2, 5)
    low[0, 3] = torch.nan
    assert ops.incremental_cost(x, low, high, 0.1, 0.2).isnan().tolist() == [True, False]
    assert ops.incremental_cost(x[:0], low[:0], high[:0], 0.1, 0.2).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"x": None}, TypeError, "x must be a tensor; got NoneType"),
        ({"raw_low": torch.ones(2, 4)}, ValueError, r"raw_low must have the shape of x, \(2, 3\); got \(2, 4\)"),
        ({"raw_high": torch.ones(2, 3).half()}, TypeError, "raw_high must have the dtype of x, torch.float32; got torch.float16"),
        ({"sigma_low": 0.0}, ValueError, "sigma_low must be finite and greater than 0; got 0.0"),
        ({"sigma_high": math.inf}, ValueError, "sigma_high must be finite and greater than 0; got inf"),
        ({"sigma_high": torch.ones(3)}, ValueError, r"sigma_high must be a float, a 0-d tensor or of shape \(2,\); got shape \(3,\)"),
        ({"sigma_low": 3.0}, ValueError, "sigma_low must be at most sigma_high; got 3.0 and 0.2"),
        ({"sigma_data": 0.0}, ValueError, "sigma_data must be finite and greater than 0; got 0.0"),
        ({"sigma_data": "0.5"}, TypeError, "sigma_data must be a number; got str"),
    ],
)
def test_cost_errors_name_the_argument(changes, error, text):
    x = torch.ones(2, 3)
    arguments = {"x": x, "raw_low": x, "raw_high": x, "sigma_low": 0.1, "sigma_high": 0.2, **changes}
    with pytest.raises(error, match=f"incremental_cost: {text}"):
        ops.incremental_cost(**arguments)


def schedules(intervals, *batch, falling=True, spread=1.0, dtype=torch.float64):
    """Uneven knots and costs, some of them 0."""
    sigmas = (torch.rand(*batch, intervals + 1, dtype=torch.float64) + 0.01).cumsum(-1)
    costs = (spread * torch.randn(*batch, intervals, dtype=torch.float64)).exp() * (torch.rand(*batch, intervals) > 0.1)
    costs[..., 0] += 0.1
    return (sigmas.flip(-1) if falling else sigmas).to(dtype), costs.to(dtype)


def running_sum(costs):
    costs = costs.double().numpy()
    return np.concatenate(([0.0], np.cumsum(np.sqrt(np.maximum(costs, 1e-12 * costs.max())))))


def solve_with_scipy(sigmas, costs, num_steps, interpolation):
    length, knots = running_sum(costs), sigmas.double().numpy()
    targets = np.arange(num_steps + 1) / num_steps * length[-1]
    solved = PchipInterpolator(length, knots)(targets) if interpolation == "pchip" else np.interp(targets, length, knots)
    return torch.from_numpy(solved)


@INTERPOLATIONS
@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(("intervals", "num_steps"), SIZES)
def test_levels_are_those_of_scipy(intervals, num_steps, name, interpolation):
    for falling in (True, False):
        sigmas, costs = schedules(intervals, falling=falling)
        with backend(name):
            levels = ops.integrate_schedule(sigmas, costs, num_steps, interpolation=interpolation)
        torch.testing.assert_close(levels, solve_with_scipy(sigmas, costs, num_steps, interpolation), rtol=1e-9, atol=0)


@settings(max_examples=100, deadline=None)
@given(
    knots=st.lists(st.floats(1e-3, 100), min_size=2, max_size=40, unique=True),
    num_steps=st.integers(1, 60),
    data=st.data(),
    falling=st.booleans(),
    interpolation=st.sampled_from(["pchip", "linear"]),
)
def test_levels_are_monotone_between_exact_ends(knots, num_steps, data, falling, interpolation):
    sigmas = torch.tensor(sorted(knots, reverse=falling), dtype=torch.float64)
    cost = st.one_of(st.just(0.0), st.floats(0, 1e300))
    costs = torch.tensor(data.draw(st.lists(cost, min_size=len(knots) - 1, max_size=len(knots) - 1)), dtype=torch.float64)
    costs[data.draw(st.integers(0, len(knots) - 2))] = data.draw(st.floats(5e-324, 1e300))
    levels = ops.integrate_schedule(sigmas, costs, num_steps, interpolation=interpolation)
    assert levels[0] == sigmas[0]
    assert levels[-1] == sigmas[-1]
    rises = -levels.diff() if falling else levels.diff()
    assert (rises >= 0).all()
    # Where an interval is so short that float64 has no numbers in it, levels may coincide; not where there is room.
    if sigmas.diff().abs().min() > 1e-6 and costs.min() > 1e-6 * costs.max():
        assert (rises > 0).all()


@INTERPOLATIONS
def test_levels_are_strictly_monotone_however_uneven_the_costs(interpolation):
    for dtype in (torch.float32, torch.float64):
        sigmas, costs = schedules(2000, dtype=dtype, spread=6.0)
        assert (ops.integrate_schedule(sigmas, costs, 200, interpolation=interpolation).diff() < 0).all()


def test_levels_have_equal_sums_of_sqrt_cost():
    sigmas, costs = schedules(300, falling=False)
    levels = ops.integrate_schedule(sigmas, costs, 17, interpolation="linear")
    length = running_sum(costs)
    shares = np.diff(np.interp(levels.numpy(), sigmas.numpy(), length))
    np.testing.assert_allclose(shares, length[-1] / 17, rtol=1e-10)


@INTERPOLATIONS
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_equal_costs_on_equal_knots_give_equal_steps(scale, interpolation):
    sigmas = torch.linspace(3, 8, 41, dtype=torch.float64)
    levels = ops.integrate_schedule(sigmas, torch.full((40,), scale, dtype=torch.float64), 13, interpolation=interpolation)
    torch.testing.assert_close(levels, torch.linspace(3, 8, 14, dtype=torch.float64), rtol=1e-13, atol=0)


@INTERPOLATIONS
def test_a_straight_line_is_reproduced(interpolation):
    """Knots that rise as the running sum does are linear in it, whatever the widths."""
    costs = torch.rand(50, dtype=torch.float64) + 0.01
    sigmas = 1 + torch.from_numpy(running_sum(costs))
    levels = ops.integrate_schedule(sigmas, costs, 9, interpolation=interpolation)
    torch.testing.assert_close(levels, torch.linspace(1, float(sigmas[-1]), 10, dtype=torch.float64), rtol=1e-13, atol=0)


@INTERPOLATIONS
def test_reversed_knots_give_reversed_levels(interpolation):
    sigmas, costs = schedules(100)
    levels = ops.integrate_schedule(sigmas, costs, 23, interpolation=interpolation)
    mirrored = ops.integrate_schedule(sigmas.flip(0), costs.flip(0), 23, interpolation=interpolation)
    torch.testing.assert_close(mirrored.flip(0), levels, rtol=1e-11, atol=0)


def test_the_scale_of_costs_and_knots_does_not_matter():
    sigmas, costs = schedules(100)
    levels = ops.integrate_schedule(sigmas, costs, 23)
    assert_bitwise(ops.integrate_schedule(sigmas, 2.0**40 * costs, 23), levels)
    assert_bitwise(ops.integrate_schedule(4 * sigmas, costs, 23), 4 * levels)


def test_one_level_for_each_knot_of_equal_cost():
    sigmas, _ = schedules(64)
    levels = ops.integrate_schedule(sigmas, torch.ones(64, dtype=torch.float64), 64)
    torch.testing.assert_close(levels, sigmas, rtol=1e-14, atol=0)


def test_schedule_of_gaussian_data():
    """Lambda(sigma) = 2 (asinh(sigma / c) - sigma / sqrt(c^2 + sigma^2)) is affine in the step, to the resolution of the grid."""
    deviation = 0.7

    def length(sigma):
        return 2 * (torch.asinh(sigma / deviation) - sigma / (deviation**2 + sigma**2).sqrt())

    grid = torch.logspace(math.log10(80), math.log10(0.002), 4097, dtype=torch.float64)
    left, entered = grid[:-1].square() + deviation**2, grid[1:].square() + deviation**2
    costs = grid[1:].square() * (entered - left).square() / (left * entered.square())
    lengths = length(ops.integrate_schedule(grid, costs, 18))
    torch.testing.assert_close(lengths, torch.linspace(float(lengths[0]), float(lengths[-1]), 19, dtype=torch.float64), rtol=0, atol=5e-3)


@pytest.mark.parametrize("sigma_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cost_dtype", [torch.float32, torch.float64])
def test_batches_of_schedules_in_either_dtype(sigma_dtype, cost_dtype):
    sigmas, costs = schedules(1500, 2, 3)
    sigmas, costs = sigmas.to(sigma_dtype), costs.to(cost_dtype)
    levels = ops.integrate_schedule(sigmas, costs, 12)
    assert levels.shape == (2, 3, 13)
    assert levels.dtype == sigma_dtype
    for i in range(2):
        for j in range(3):
            assert_bitwise(ops.integrate_schedule(sigmas[i, j], costs[i, j], 12), levels[i, j])
    torch.testing.assert_close(levels[1, 2].double(), solve_with_scipy(sigmas[1, 2], costs[1, 2], 12, "pchip"), rtol=1e-6, atol=0)


def test_levels_are_reproducible_in_any_layout_and_number_of_threads():
    sigmas, costs = schedules(40_000, 2)
    assert_independent_of_threads(lambda: ops.integrate_schedule(sigmas, costs, 5000))
    strided = [x.t().contiguous().t() for x in (sigmas, costs)]
    assert_bitwise(ops.integrate_schedule(*strided, 30), ops.integrate_schedule(sigmas, costs, 30))


def test_no_schedules_at_all():
    assert ops.integrate_schedule(torch.ones(0, 3), torch.ones(0, 2), 4).shape == (0, 5)


@INTERPOLATIONS
def test_a_million_knots(interpolation):
    """Against SciPy and float32, both within a millionth."""
    sigmas, costs = (x[0] for x in schedules(1_000_000, 1))
    levels = ops.integrate_schedule(sigmas, costs, 50, interpolation=interpolation)
    lengths = np.concatenate(([0.0], np.cumsum(np.sqrt(np.maximum(costs.numpy(), 1e-12 * costs.max().item())))))
    targets = np.linspace(0, lengths[-1], 51)
    solved = PchipInterpolator(lengths, sigmas)(targets) if interpolation == "pchip" else np.interp(targets, lengths, sigmas)
    np.testing.assert_allclose(levels, solved, rtol=1e-6)
    narrow = ops.integrate_schedule(sigmas, costs.float(), 50, interpolation=interpolation)
    np.testing.assert_allclose(narrow, levels, rtol=1e-6)


def test_zero_costs_take_a_millionth_of_the_largest_step():
    """The floor is 1e-12 of the largest cost, 1e-6 of its square root."""
    sigmas, costs = torch.tensor([0.0, 1, 2], dtype=torch.float64), torch.tensor([1.0, 0], dtype=torch.float64)
    middle = ops.integrate_schedule(sigmas, costs, 2, interpolation="linear")[1]
    assert middle.item() == pytest.approx((1 + 1e-6) / 2, rel=1e-14)


KNOTS, COSTS = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 1.0])


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([3.0, 1.0], COSTS, 2), TypeError, "sigmas must be a tensor; got list"),
        ((KNOTS.bfloat16(), COSTS, 2), TypeError, "sigmas must be float32 or float64; got torch.bfloat16"),
        ((KNOTS, COSTS.half(), 2), TypeError, "costs must be float32 or float64; got torch.float16"),
        ((KNOTS[:1], COSTS[:0], 2), ValueError, r"sigmas must have at least 2 knots in the last dimension; got shape \(1,\)"),
        ((KNOTS, COSTS[:1], 2), ValueError, r"costs must have shape \(2,\), one for every interval of sigmas; got \(1,\)"),
        ((KNOTS, COSTS[None], 2), ValueError, r"costs must have shape \(2,\), one for every interval of sigmas; got \(1, 2\)"),
        ((KNOTS, COSTS.to("meta"), 2), ValueError, "costs must be on the device of sigmas, cpu; got meta"),
        ((KNOTS, COSTS, 0), ValueError, "num_steps must be at least 1; got 0"),
        ((KNOTS, COSTS, 2.0), TypeError, "num_steps must be an int; got float"),
        ((KNOTS, COSTS, True), TypeError, "num_steps must be an int; got bool"),
        ((torch.tensor([1.0, 1.0, 0.5]), COSTS, 2), ValueError, "sigmas must be strictly monotone; got 1 followed by 1 at knot 0"),
        ((torch.tensor([1.0, 2.0, 1.5]), COSTS, 1), ValueError, "sigmas must be strictly monotone; got 2 followed by 1.5 at knot 1"),
        ((torch.tensor([1.0, math.nan, 3.0]), COSTS, 2), ValueError, "sigmas must be finite; got nan at index 1"),
        ((torch.tensor([1.0, 2.0, math.inf]), COSTS, 2), ValueError, "sigmas must be finite; got inf at index 2"),
        ((KNOTS, torch.tensor([1.0, -1.0]), 2), ValueError, "costs must be finite and at least 0; got -1 at index 1"),
        ((KNOTS, torch.tensor([math.nan, 1.0]), 2), ValueError, "costs must be finite and at least 0; got nan at index 0"),
        ((KNOTS, torch.tensor([1.0, math.inf]), 2), ValueError, "costs must be finite and at least 0; got inf at index 1"),
        ((KNOTS, torch.zeros(2), 2), ValueError, "costs must not all be 0 in a schedule"),
        ((KNOTS.expand(2, 3), torch.tensor([[1.0, 1.0], [0.0, -2.0]]), 2), ValueError, r"costs must be .* got -2 at index \(1, 1\)"),
        ((KNOTS.expand(2, 3), torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 2), ValueError, "costs must not all be 0 in a schedule"),
    ],
)
def test_schedule_errors_name_the_argument(arguments, error, text, name):
    with backend(name), pytest.raises(error, match=f"integrate_schedule: {text}"):
        ops.integrate_schedule(*arguments)


def test_unknown_interpolations_are_refused():
    with pytest.raises(ValueError, match="interpolation must be one of 'pchip', 'linear'; got 'cubic'"):
        ops.integrate_schedule(KNOTS, COSTS, 2, interpolation="cubic")


def test_gradients_are_refused():
    with pytest.raises(ValueError, match="integrate_schedule: costs must not require grad"):
        ops.integrate_schedule(KNOTS, COSTS.clone().requires_grad_(), 2)
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="incremental_cost: raw_low must not require grad"):
        ops.incremental_cost(x, x.clone().requires_grad_(), x, 0.1, 0.2)
    with pytest.raises(ValueError, match="sigma_low is a constant and must not require grad"):
        ops.incremental_cost(x, x, x, torch.tensor(0.1, requires_grad=True), 0.2)


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def optimise(x, low, high, sigmas):
        costs = ops.incremental_cost(x, low, high, 0.1, 0.2)
        return ops.integrate_schedule(sigmas, costs, 4)

    inputs, sigmas = network_outputs(5, 20), torch.linspace(2, 1, 6)
    assert_bitwise(optimise(*inputs, sigmas), ops.integrate_schedule(sigmas, ops.incremental_cost(*inputs, 0.1, 0.2), 4))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4, 7, 3), (2, 16385), (6,), (0, 5), (2, 0)])
def test_gpu_costs_agree_with_the_definition(shape, dtype, name):
    inputs = [x.cuda() for x in network_outputs(*shape, dtype=dtype)]
    with backend("reference"):
        truth = ops.incremental_cost(*[x.double() for x in inputs], 0.5, 2.0)
    with backend(name):
        cost = ops.incremental_cost(*inputs, 0.5, 2.0)
    torch.testing.assert_close(cost.double(), truth, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


@pytest.mark.gpu
@INTERPOLATIONS
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize(("intervals", "num_steps"), [*SIZES, (1_000_000, 100)])
def test_gpu_levels_agree_with_the_definition(intervals, num_steps, name, interpolation):
    sigmas, costs = (x.cuda() for x in schedules(intervals, 2))
    with backend("reference"):
        expected = ops.integrate_schedule(sigmas, costs, num_steps, interpolation=interpolation)
    with backend(name):
        levels = ops.integrate_schedule(sigmas, costs, num_steps, interpolation=interpolation)
        torch.testing.assert_close(levels, expected, rtol=1e-9, atol=0)
        bad = torch.stack((sigmas[0], sigmas[0].roll(1) if intervals > 1 else torch.ones_like(sigmas[0])))
        rows = ops.integrate_schedule(bad, costs, num_steps, interpolation=interpolation).isnan().all(-1)
    assert rows.tolist() == [False, True]
