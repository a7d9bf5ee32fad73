"""The module `_host`: the schedule solver on NumPy arrays, and the build report."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from scipy.interpolate import PchipInterpolator

from fastdiff_kernels import _host, ops


def schedule(intervals, seed=0):
    generator = np.random.default_rng(seed)
    return np.cumsum(generator.random(intervals + 1) + 0.01)[::-1].copy(), np.exp(generator.normal(size=intervals))


@pytest.mark.parametrize("interpolation", ["pchip", "linear"])
@pytest.mark.parametrize(("intervals", "num_steps"), [(1, 1), (1, 4), (2, 9), (300, 18), (5000, 700), (1_000_000, 50)])
def test_levels_are_those_of_scipy_and_of_the_op(intervals, num_steps, interpolation):
    sigmas, costs = schedule(intervals)
    levels = _host.integrate_schedule(sigmas, costs, num_steps, interpolation)
    length = np.concatenate(([0.0], np.cumsum(np.sqrt(costs))))
    targets = np.linspace(0, length[-1], num_steps + 1)
    expected = PchipInterpolator(length, sigmas)(targets) if interpolation == "pchip" else np.interp(targets, length, sigmas)
    assert levels.dtype == np.float64
    assert levels.shape == (num_steps + 1,)
    assert (levels[0], levels[-1]) == (sigmas[0], sigmas[-1])
    np.testing.assert_allclose(levels, expected, rtol=1e-9)
    of_op = ops.integrate_schedule(torch.from_numpy(sigmas), torch.from_numpy(costs), num_steps, interpolation=interpolation)
    np.testing.assert_allclose(levels, of_op.numpy(), rtol=1e-12)


def test_pchip_is_the_default_and_arguments_have_names():
    sigmas, costs = schedule(10)
    levels = _host.integrate_schedule(sigmas=sigmas, costs=costs, num_steps=3)
    np.testing.assert_array_equal(levels, _host.integrate_schedule(sigmas, costs, 3, "pchip"))


def test_strided_and_read_only_arrays():
    sigmas, costs = schedule(10)
    doubled = np.repeat(sigmas, 2)[::2], np.repeat(costs, 2)[::2]
    for array in doubled:
        array.flags.writeable = False
    np.testing.assert_array_equal(_host.integrate_schedule(*doubled, 7), _host.integrate_schedule(sigmas, costs, 7))


def test_threads_solve_side_by_side():
    problems = [schedule(20_000, seed) for seed in range(4)]
    expected = [_host.integrate_schedule(*problem, 50) for problem in problems]
    found: list = [None] * len(problems)

    def solve(i):
        for _ in range(10):
            found[i] = _host.integrate_schedule(*problems[i], 50)

    threads = [threading.Thread(target=solve, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for levels, alone in zip(found, expected, strict=True):
        np.testing.assert_array_equal(levels, alone)


SIGMAS, COSTS = np.array([3.0, 2.0, 1.0]), np.array([1.0, 1.0])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([3.0, 2.0, 1.0], COSTS, 2), TypeError, "sigmas must be a NumPy array; got list"),
        ((SIGMAS.astype(np.float32), COSTS, 2), TypeError, "sigmas must be float64; got float32"),
        ((SIGMAS, COSTS.astype(">f8"), 2), TypeError, "costs must be float64; got >f8"),
        ((SIGMAS, COSTS.astype(int), 2), TypeError, "costs must be float64; got int64"),
        ((SIGMAS[None], COSTS, 2), ValueError, "sigmas must have 1 dimension; got 2"),
        ((SIGMAS[:1], COSTS[:0], 2), ValueError, "sigmas must have at least 2 knots; got 1"),
        ((SIGMAS, COSTS[:1], 2), ValueError, "costs must have 2 elements, one for every interval of sigmas; got 1"),
        ((SIGMAS, COSTS, 0), ValueError, "num_steps must be at least 1; got 0"),
        ((SIGMAS, COSTS, 2.5), TypeError, "incompatible function arguments"),
        ((SIGMAS, COSTS, 2, "cubic"), ValueError, "interpolation must be one of 'pchip', 'linear'; got 'cubic'"),
        ((np.array([1.0, 2.0, 2.0]), COSTS, 2), ValueError, "sigmas must be strictly monotone; got 2 followed by 2 at knot 1"),
        ((np.array([1.0, 3.0, 2.0]), COSTS, 2), ValueError, "sigmas must be strictly monotone; got 3 followed by 2 at knot 1"),
        ((np.array([np.inf, 3.0, 2.0]), COSTS, 2), ValueError, "sigmas must be finite; got inf at index 0"),
        ((SIGMAS, np.array([1.0, np.nan]), 2), ValueError, "costs must be finite and at least 0; got nan at index 1"),
        ((SIGMAS, np.array([-1.0, 1.0]), 2), ValueError, "costs must be finite and at least 0; got -1 at index 0"),
        ((SIGMAS, np.zeros(2), 2), ValueError, "costs must not all be 0"),
    ],
)
def test_errors_name_the_argument(arguments, error, text):
    with pytest.raises(error, match=text):
        _host.integrate_schedule(*arguments)


def test_build_report_says_what_was_built():
    report = json.loads(_host.build_report())
    assert report["torch_target"] == "2.11"
    assert "baseline" in report["cpu_variants"]
