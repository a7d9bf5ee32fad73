"""Solvers against closed forms and textbook loops, what a result counts, and errors."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastdiff_kernels.diffusion import AdaptiveSkip, EDMPrecond, Schedule, sample

from .oracles import GaussianNetwork, Recorder, column, gaussian_denoiser, gaussian_flow, given_noise, two_points

SOLVERS = ["euler", "ddim", "heun", "dpmpp_2m"]


def without_zero(schedule: Schedule) -> Schedule:
    return Schedule(schedule.sigmas[:-1])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("c", [0.5, 1.7])
@pytest.mark.parametrize("grid", [Schedule.karras, Schedule.log_uniform])
def test_order_of_convergence(solver: str, order: int, c: float, grid: object) -> None:
    noise = torch.randn(2, 8, dtype=torch.float64)
    truth = gaussian_flow(20.0 * noise, c, 20.0, 0.1)
    errors = [
        (sample(gaussian_denoiser(c), noise, without_zero(grid(steps + 1, 0.1, 20.0)), solver=solver).samples - truth).abs().max()
        for steps in (160, 320)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_have_the_spread_of_the_data(solver: str) -> None:
    denoiser = EDMPrecond(GaussianNetwork(0.8))
    result = sample(denoiser, torch.randn(64, 64), Schedule.karras(100, 0.002, 80.0), solver=solver)
    assert result.samples.std() == pytest.approx(0.8, rel=0.05)


def heun_loop(denoiser: object, x: Tensor, levels: list[float]) -> Tensor:
    for sigma, sigma_next in pairwise(levels):
        slope = (x - denoiser(x, x.new_full((len(x),), sigma))) / sigma
        guess = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope_next = (guess - denoiser(guess, x.new_full((len(x),), sigma_next))) / sigma_next
            guess = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = guess
    return x


def dpmpp_2m_loop(denoiser: object, x: Tensor, levels: list[float]) -> Tensor:
    last, h_last = None, None
    for sigma, sigma_next in pairwise(levels):
        denoised = denoiser(x, x.new_full((len(x),), sigma))
        if sigma_next == 0:
            return denoised
        h = math.log(sigma) - math.log(sigma_next)
        used = denoised
        if last is not None:
            r = h_last / h
            used = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * last
        x = sigma_next / sigma * x - math.expm1(-h) * used
        last, h_last = denoised, h
    return x


def ddim_loop(denoiser: object, x: Tensor, levels: list[float]) -> Tensor:
    for sigma, sigma_next in pairwise(levels):
        denoised = denoiser(x, x.new_full((len(x),), sigma))
        x = denoised + sigma_next / sigma * (x - denoised)
    return x


@pytest.mark.parametrize(("solver", "loop"), [("ddim", ddim_loop), ("heun", heun_loop), ("dpmpp_2m", dpmpp_2m_loop)])
@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("ends_in_zero", [True, False])
def test_solver_is_its_textbook_loop(solver: str, loop: object, steps: int, ends_in_zero: bool) -> None:
    schedule = Schedule.karras(steps, 0.05, 40.0) if ends_in_zero else without_zero(Schedule.karras(steps + 1, 0.05, 40.0))
    noise = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    result = sample(two_points, noise, schedule, solver=solver)
    torch.testing.assert_close(result.samples, loop(two_points, noise * 40.0, schedule.sigmas.tolist()))


def test_ddim_is_euler_bit_for_bit() -> None:
    noise, schedule = torch.randn(3, 16), Schedule.karras(12, 0.02, 80.0)
    assert torch.equal(*(sample(two_points, noise, schedule, solver=solver).samples for solver in ("euler", "ddim")))


def test_dpmpp_is_exact_for_a_constant_prediction_and_euler_for_constant_noise() -> None:
    noise, target = torch.randn(2, 8, dtype=torch.float64), torch.full((2, 8), 0.3, dtype=torch.float64)
    schedule = Schedule([10.0, 3.0, 1.0, 0.5])
    result = sample(lambda x, sigma: target, noise, schedule, solver="dpmpp_2m")
    torch.testing.assert_close(result.samples, target + 0.05 * (10.0 * noise - target))
    result = sample(given_noise(lambda sigma: 0.7 * torch.ones_like(sigma)), noise, schedule, solver="euler")
    torch.testing.assert_close(result.samples, 10.0 * noise - 9.5 * 0.7)


@pytest.mark.parametrize(("solver", "calls"), [("euler", 6), ("ddim", 6), ("heun", 11), ("dpmpp_2m", 6)])
def test_network_calls_are_counted(solver: str, calls: int) -> None:
    recorder = Recorder(two_points)
    result = sample(recorder, torch.randn(3, 8), Schedule.karras(6, 0.02, 80.0), solver=solver)
    assert result.nfe == len(recorder.calls) == calls
    assert isinstance(result.nfe, int)
    assert result.nfe_per_sample.tolist() == [calls] * 3
    assert result.skipped.tolist() == [False] * 6


def test_heun_without_a_final_zero_calls_twice_in_every_step() -> None:
    assert sample(two_points, torch.randn(3, 8), Schedule([4.0, 2.0, 1.0]), solver="heun").nfe == 4


@pytest.mark.parametrize(("dtype", "sigma_dtype"), [("float32", "float32"), ("float64", "float64"), ("bfloat16", "float32")])
def test_denoiser_gets_unscaled_samples_and_one_level_each(dtype: str, sigma_dtype: str) -> None:
    recorder = Recorder(lambda x, sigma: 0.5 * x)
    noise = torch.randn(3, 2, 4, dtype=getattr(torch, dtype))
    result = sample(recorder, noise, Schedule([4.0, 2.0, 0.0]), solver="euler")
    assert result.samples.dtype == noise.dtype
    first, second = recorder.calls
    assert torch.equal(first[0], noise * 4.0)
    torch.testing.assert_close(second[0], noise * 3.0)
    for (_, sigma, _), level in zip(recorder.calls, (4.0, 2.0), strict=True):
        assert sigma.dtype == getattr(torch, sigma_dtype)
        assert sigma.tolist() == [level] * 3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("skip", [None, AdaptiveSkip(), AdaptiveSkip(per_sample=True), AdaptiveSkip(mode="tensor", per_sample=True)])
def test_empty_batch(solver: str, skip: AdaptiveSkip | None) -> None:
    result = sample(two_points, torch.empty(0, 3, 4), Schedule.karras(8, 0.1, 10.0), solver=solver, skip=skip)
    assert result.samples.shape == (0, 3, 4)
    assert result.nfe_per_sample.shape == (0,)
    guided = sample(two_points, torch.empty(0, 3, 4), Schedule([2.0, 1.0, 0.0]), solver=solver, unconditional={}, guidance=2.0, skip=skip)
    assert guided.samples.shape == (0, 3, 4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch(solver: str) -> None:
    noise, place, schedule = torch.randn(5, 64), torch.linspace(0.3, 2.0, 5), Schedule.karras(10, 0.02, 80.0)
    together = sample(two_points, noise, schedule, solver=solver, conditioning={"place": place}).samples
    for i in range(5):
        alone = sample(two_points, noise[i : i + 1], schedule, solver=solver, conditioning={"place": place[i : i + 1]}).samples
        assert torch.equal(together[i : i + 1], alone)


def test_no_graph_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    result = sample(lambda x, sigma: weight * x / (1 + column(sigma, x)), torch.randn(2, 4), Schedule([2.0, 1.0, 0.0]))
    assert not result.samples.requires_grad


def test_noise_is_left_alone() -> None:
    noise = torch.randn(2, 8)
    before = noise.clone()
    sample(two_points, noise, Schedule([1.0, 0.5, 0.0]), skip=AdaptiveSkip())
    assert torch.equal(noise, before)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    noise, schedule = torch.randn(2, 8), Schedule([1.0, 0.5, 0.0])
    sample(two_points, noise, schedule)
    assert capsys.readouterr().err == ""
    sample(two_points, noise, schedule, progress=True)
    assert "sampling: 100%" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install 'fastdiff-kernels\[train\]'"):
        sample(two_points, noise, schedule, progress=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"denoiser": 3}, TypeError, "denoiser must be callable, got int"),
        ({"noise": [1.0]}, TypeError, "noise must be a tensor, got list"),
        ({"noise": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "noise must be a floating-point tensor"),
        ({"noise": torch.tensor(1.0)}, ValueError, r"noise must have shape \[B, ...\]"),
        ({"schedule": [1.0, 0.0]}, TypeError, "schedule must be a Schedule, got list"),
        ({"solver": "rk4"}, ValueError, "solver must be one of 'euler', 'ddim', 'heun', 'dpmpp_2m', got 'rk4'"),
        ({"skip": 4}, TypeError, "skip must be an AdaptiveSkip, a FixedSkip or None, got int"),
        ({"denoiser": lambda x, sigma: None}, TypeError, "denoiser must return a tensor, got NoneType"),
        ({"denoiser": lambda x, sigma: x[:, :1]}, ValueError, r"x's shape \[2, 3\], got \[2, 1\]"),
        ({"denoiser": lambda x, sigma: x.half()}, TypeError, "x's dtype torch.float32, got torch.float16"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"denoiser": two_points, "noise": torch.ones(2, 3), "schedule": Schedule([1.0, 0.5, 0.0]), **change}
    with pytest.raises(error, match=message):
        sample(arguments.pop("denoiser"), arguments.pop("noise"), arguments.pop("schedule"), **arguments)
