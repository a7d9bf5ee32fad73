"""Optimised schedules against the exact geodesics of Gaussian data, and what the estimate is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastdiff_kernels.diffusion import EDMPrecond, Schedule, optimize_schedule
from fastdiff_kernels.diffusion.interval_costs import IntervalCosts

from .oracles import GaussianNetwork, column, gaussian_denoiser, gaussian_length, geodesic


def gaussian_data(c: float, count: int, dimensions: int) -> Tensor:
    return c * torch.randn(count, dimensions, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("knots", "error"), [(256, 7e-3), (1024, 2e-3)])
@pytest.mark.parametrize(("c", "sigma_min", "sigma_max"), [(0.5, 0.002, 80.0), (0.9, 0.01, 20.0)])
def test_gaussian_geodesic(c: float, sigma_min: float, sigma_max: float, knots: int, error: float) -> None:
    """The grid alone misplaces levels by 6e-3 at 256 knots and 1.5e-3 at 1024 (in ln sigma, 18 steps); the rest is sampling."""
    denoiser, data = EDMPrecond(GaussianNetwork(c)), gaussian_data(c, 500, 2048)
    schedule = optimize_schedule(denoiser, data, 19, sigma_min=sigma_min, sigma_max=sigma_max, knots=knots, batch_size=16)
    exact = geodesic(gaussian_length(c), 18, sigma_min, sigma_max)
    assert schedule.num_steps == 19
    assert schedule.sigmas[-1] == 0
    assert schedule.sigmas[:-1].log().numpy() == pytest.approx(np.log(exact), abs=error)
    length = math.sqrt(2048) * (gaussian_length(c)(sigma_max) - gaussian_length(c)(sigma_min))
    assert schedule.length == pytest.approx(length, rel=3e-3)


def test_printed_geodesic() -> None:
    """c = .5, d = 1, [.002, 80]: length 9.5367005 and the levels of 18 steps."""
    exact = geodesic(gaussian_length(0.5), 18, 0.002, 80.0)
    printed = [0.002, 0.6226, 0.973, 1.3721, 1.8618, 2.4807, 3.2737, 4.2973, 5.6242, 7.3479, 9.5903, 12.5097, 16.312, 21.2658, 27.7207]
    printed += [36.1323, 47.0944, 61.3808, 80.0]
    assert exact[::-1] == pytest.approx(printed, rel=1e-4)
    assert gaussian_length(0.5)(80.0) - gaussian_length(0.5)(0.002) == pytest.approx(9.5367005, abs=1e-6)
    assert gaussian_length(0.5)(10.0) - gaussian_length(0.5)(0.1) == pytest.approx(5.3763551, abs=1e-6)


@pytest.mark.parametrize(("c", "d", "high", "low"), [(0.5, 3, 1.2, 0.9), (0.7, 5, 2.0, 0.5)])
def test_incremental_cost_of_a_gaussian(c: float, d: int, high: float, low: float) -> None:
    """L_c = sigma'^2 d (V' - V)^2 / (V V'^2), V = c^2 + sigma^2: 0.50791 for c = .5, d = 3, 1.2 -> .9."""
    before, after = c**2 + high**2, c**2 + low**2
    cost = low**2 * d * (after - before) ** 2 / (before * after**2)
    if c == 0.5:
        assert cost == pytest.approx(0.50791, abs=1e-5)
    schedule = optimize_schedule(
        EDMPrecond(GaussianNetwork(c)),
        gaussian_data(c, 100_000, d),
        2,
        sigma_min=low**2 / high,
        sigma_max=high,
        knots=3,
        batch_size=100_000,
    )
    assert schedule.knots.tolist() == pytest.approx([high, low, low**2 / high])
    assert schedule.cost[0].item() == pytest.approx(cost, rel=5 * math.sqrt(2 / (100_000 * d)))


class AnisotropicNetwork(nn.Module):
    """F of the exact score of N(0, diag(spread^2)), sigma_data = .5."""

    def __init__(self, spread: Tensor) -> None:
        super().__init__()
        self.spread = spread

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        sigma = column((4 * noise_level).exp(), x)
        return x * sigma * (self.spread**2 - 0.25) / ((self.spread**2 + sigma**2) * 0.5)


def test_anisotropic_geodesic() -> None:
    """delta = 4 sigma^4 sum_j (lambda_j + sigma^2)^-3, its root integrated numerically."""
    spread = torch.logspace(-1.5, 0.5, 512)
    grid = np.geomspace(0.005, 50.0, 20_001)
    speed = 2 * grid**2 * np.sqrt(((spread.numpy()[:, None] ** 2 + grid**2) ** -3.0).sum(0))
    lengths = np.concatenate(([0.0], np.cumsum((speed[1:] + speed[:-1]) / 2 * np.diff(grid))))
    exact = np.interp(np.linspace(lengths[-1], 0, 12), lengths, grid)
    data = spread * torch.randn(2000, 512, generator=torch.Generator().manual_seed(0))
    schedule = optimize_schedule(EDMPrecond(AnisotropicNetwork(spread)), data, 12, sigma_min=0.005, sigma_max=50.0)
    assert schedule.sigmas[:-1].log().numpy() == pytest.approx(np.log(exact), abs=2e-2)
    assert schedule.length == pytest.approx(lengths[-1], rel=1e-2)


def test_levels_cost_the_same() -> None:
    """The running sum of sqrt(cost) over the grid is affine in the step."""
    denoiser = EDMPrecond(GaussianNetwork(0.4))
    schedule = optimize_schedule(denoiser, gaussian_data(0.4, 400, 64), 9, sigma_min=0.02, sigma_max=80.0)
    running = np.concatenate(([0.0], schedule.cost.sqrt().cumsum(0).numpy()))
    at_levels = np.interp(-schedule.sigmas[:-1].log(), -schedule.knots.log(), running)
    assert at_levels == pytest.approx(np.linspace(0, schedule.length, 9), abs=2e-3 * schedule.length)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_ends_stand_exactly(num_steps: int) -> None:
    schedule = optimize_schedule(
        EDMPrecond(GaussianNetwork(0.4)), gaussian_data(0.4, 50, 8), num_steps, sigma_min=0.02, sigma_max=80.0, knots=32
    )
    assert schedule.num_steps == num_steps
    assert schedule.sigmas[0] == 80.0
    assert schedule.sigmas[-1] == 0.0
    if num_steps > 1:
        assert schedule.sigmas[-2] == 0.02


class SpyDenoiser:
    """Exact for N(0, .5^2); notes what it is asked."""

    sigma_data = 0.5

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, dict[str, object]]] = []

    def raw(self, x: Tensor, sigma: Tensor, **conditioning: object) -> Tensor:
        self.calls.append((x, sigma, conditioning))
        return torch.sin(x)


def test_both_levels_of_an_interval_see_the_same_noisier_samples() -> None:
    spy = SpyDenoiser()
    data = torch.zeros(6, 4096)
    schedule = optimize_schedule(spy, data, 3, sigma_min=0.1, sigma_max=10.0, knots=5, batch_size=4)
    assert len(spy.calls) == 4
    for (x, sigma, _), high, low in zip(spy.calls, schedule.knots[:-1].tolist(), schedule.knots[1:].tolist(), strict=True):
        assert sigma.dtype == torch.float32
        assert torch.equal(x[:4], x[4:])
        assert sigma.tolist() == pytest.approx([low] * 4 + [high] * 4)
        assert x.std().item() == pytest.approx(high, rel=0.05)
    drawn = [x[0] / sigma[-1] for x, sigma, _ in spy.calls]
    assert all((a * b).mean().abs() < 0.1 for i, a in enumerate(drawn) for b in drawn[:i]), "noise is drawn anew for every interval"


def test_conditioning_follows_its_datum() -> None:
    spy = SpyDenoiser()
    labels = torch.arange(7)
    data = 100.0 * labels.float()[:, None].expand(7, 3)
    optimize_schedule(
        spy, data, 3, sigma_min=0.01, sigma_max=0.1, knots=8, batch_size=4, conditioning={"class_labels": labels, "mode": "a"}
    )
    seen = torch.cat([arguments["class_labels"][:4] for _, _, arguments in spy.calls])
    assert sorted(seen.tolist()) == sorted(4 * list(range(7))), "every datum is drawn equally often"
    for x, _, arguments in spy.calls:
        assert torch.equal(arguments["class_labels"][:4], arguments["class_labels"][4:])
        assert arguments["mode"] == "a"
        assert (x - 100.0 * arguments["class_labels"][:, None]).abs().max() < 1


def test_seed_decides_all_and_leaves_the_global_generator_alone() -> None:
    def optimise(seed: int) -> list[float]:
        denoiser = EDMPrecond(GaussianNetwork(0.4))
        return optimize_schedule(denoiser, gaussian_data(0.4, 50, 8), 5, sigma_min=0.02, sigma_max=8.0, knots=32, seed=seed).sigmas.tolist()

    torch.manual_seed(5)
    first = optimise(1)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert optimise(1) == first
    assert optimise(2) != first


def test_interpolation_may_be_linear() -> None:
    exact = geodesic(gaussian_length(0.4), 8, 0.02, 8.0)
    for interpolation in ("pchip", "linear"):
        schedule = optimize_schedule(
            EDMPrecond(GaussianNetwork(0.4)),
            gaussian_data(0.4, 100, 512),
            9,
            sigma_min=0.02,
            sigma_max=8.0,
            interpolation=interpolation,
        )
        assert schedule.sigmas[:-1].log().numpy() == pytest.approx(np.log(exact), abs=2e-2)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    optimize_schedule(EDMPrecond(GaussianNetwork(0.4)), gaussian_data(0.4, 9, 8), 3, sigma_min=0.1, sigma_max=8.0, knots=4, progress=True)
    assert "schedule: 100%" in capsys.readouterr().err


def test_optimised_schedule_beats_karras_on_the_cost_it_minimises() -> None:
    """sum of costs is least, (length / steps)^2 each, where all are equal; here on the continuous cost of Gaussian data."""
    length = gaussian_length(0.5)
    schedule = optimize_schedule(EDMPrecond(GaussianNetwork(0.5)), gaussian_data(0.5, 200, 256), 10, sigma_min=0.02, sigma_max=80.0)

    def energy(s: Schedule) -> float:
        return sum((length(a) - length(b)) ** 2 for a, b in zip(s.sigmas[:-2].tolist(), s.sigmas[1:-1].tolist(), strict=True))

    assert energy(schedule) < energy(Schedule.karras(10, 0.02, 80.0))
    assert energy(schedule) == pytest.approx((length(80.0) - length(0.02)) ** 2 / 9, rel=1e-2)


def _fails(error: type[Exception], message: str, **change: object) -> object:
    return pytest.param(change, error, message, id=message[:40])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        _fails(TypeError, "denoiser must offer .raw.*function has no .raw", denoiser=gaussian_denoiser(0.5)),
        _fails(TypeError, "data must be a tensor", data=[1.0]),
        _fails(TypeError, "data must be float32 or float64", data=torch.ones(2, 3, dtype=torch.bfloat16)),
        _fails(ValueError, r"data must hold samples \[N, ...\] with N >= 1, got shape \[0, 3\]", data=torch.ones(0, 3)),
        _fails(ValueError, r"data must hold samples .* got shape \[3\]", data=torch.ones(3)),
        _fails(ValueError, "num_steps must be at least 1", num_steps=0),
        _fails(TypeError, "num_steps must be an int", num_steps=3.0),
        _fails(ValueError, "sigma_min must be below sigma_max", sigma_min=80.0),
        _fails(ValueError, "sigma_min must be positive", sigma_min=0.0),
        _fails(ValueError, "knots must be at least 3", knots=2),
        _fails(ValueError, "batch_size must be at least 1", batch_size=0),
        _fails(ValueError, "seed must be at least 0", seed=-1),
        _fails(ValueError, "cost must be one of 'corrector', 'predictor', got 'both'", cost="both"),
        _fails(ValueError, "num_steps must be at least 3 with cost='predictor'", cost="predictor", num_steps=2, knots=None),
        _fails(ValueError, "rounds must be at least 1", rounds=0),
        _fails(ValueError, "tolerance must be finite and >= 0, got -1.0", tolerance=-1.0),
        _fails(ValueError, "damping must be finite and > 0 and <= 1, got 0.0", damping=0.0, cost="predictor", knots=None),
        _fails(ValueError, "damping belongs to cost='predictor' and must be None with 'corrector'.*, got 1.0", damping=1.0),
        _fails(ValueError, "knots belong to cost='corrector' and must be None with 'predictor'.*, got 4", cost="predictor"),
        _fails(TypeError, "data must be a tensor or an iterable of batches, got int", data=3),
        _fails(ValueError, "data gives no batch when started again", data=[], batch_size=None),
        _fails(TypeError, r"data must give batches or pairs \(batch, conditioning\), got a list of 3", data=[[1, 2, 3]], batch_size=None),
        _fails(TypeError, "the batch's conditioning must be a dict", data=[[torch.ones(4, 3), torch.ones(4)]], batch_size=None),
        _fails(ValueError, "batch_size must be None where data is an iterable.*, got 2", data=[torch.ones(4, 3)]),
        _fails(ValueError, "conditioning must hold scalars", data=[torch.ones(4, 3)], conditioning={"place": torch.ones(4)}),
        _fails(ValueError, "interpolation must be one of 'pchip', 'linear', got 'cubic'", interpolation="cubic"),
        _fails(ValueError, r"conditioning\['place'\] must have one row for each of the 4 samples", conditioning={"place": torch.ones(3)}),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    sizes = {"num_steps": 3, "sigma_min": 0.1, "sigma_max": 8.0, "knots": 4, "batch_size": 2}
    arguments = {"denoiser": EDMPrecond(GaussianNetwork(0.4)), "data": torch.ones(4, 3), **sizes, **change}
    optimise: Callable[..., Schedule] = optimize_schedule
    with pytest.raises(error, match=message):
        optimise(arguments.pop("denoiser"), arguments.pop("data"), arguments.pop("num_steps"), **arguments)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_reported(factor: float) -> None:
    class Broken(SpyDenoiser):
        def raw(self, x: Tensor, sigma: Tensor) -> Tensor:
            return factor * x

    with pytest.raises(ValueError, match=r"denoiser.raw gives a cost of (nan|inf) between sigma 8 and"):
        optimize_schedule(Broken(), torch.ones(4, 3), 3, sigma_min=0.1, sigma_max=8.0, knots=4)


def test_costs_that_are_all_zero_are_reported() -> None:
    costs = IntervalCosts(torch.tensor([8.0, 1.0, 0.1], dtype=torch.float64), {})
    for _ in range(2):
        costs.add(torch.zeros(4))
    with pytest.raises(ValueError, match=r"denoiser.raw gives no cost above 0 between sigma 8 and 0.1; its score must change with sigma"):
        costs.finish_round()


@settings(max_examples=15, deadline=None)
@given(c=st.floats(0.2, 1.5), low=st.floats(0.01, 0.3), high=st.floats(2.0, 60.0), steps=st.integers(2, 20))
def test_any_gaussian_gives_its_geodesic(c: float, low: float, high: float, steps: int) -> None:
    """Up to the sampling error that the schedule itself reports and the grid's own."""
    schedule = optimize_schedule(
        EDMPrecond(GaussianNetwork(c)), gaussian_data(c, 200, 1024), steps + 1, sigma_min=low, sigma_max=high, knots=192, batch_size=8
    )
    exact = np.log(geodesic(gaussian_length(c), steps, low, high))
    allowed = 5 * schedule.error[:-1].numpy() + 1.5e-2
    assert (np.abs(schedule.sigmas[:-1].log().numpy() - exact) < allowed).all()


def test_errors_of_the_levels_are_those_of_repetition() -> None:
    """Reported standard errors against the spread over seeds."""
    denoiser, data = EDMPrecond(GaussianNetwork(0.5)), gaussian_data(0.5, 4000, 16)

    def optimise(seed: int) -> Schedule:
        return optimize_schedule(denoiser, data, 7, sigma_min=0.05, sigma_max=20.0, knots=64, batch_size=16, seed=seed)

    found = [optimise(seed) for seed in range(40)]
    spread = torch.stack([s.sigmas[:-1].log() for s in found]).std(0)
    reported = torch.stack([s.error[:-1] for s in found]).mean(0)
    assert reported[[0, -1]].tolist() == [0, 0]
    assert (reported[1:-1] / spread[1:-1]).numpy() == pytest.approx(np.ones(5), abs=0.35)
    costs = torch.stack([s.cost for s in found])
    errors = torch.stack([s.cost_error for s in found])
    assert float((errors.mean(0) / costs.std(0)).mean()) == pytest.approx(1, abs=0.1)


def test_rounds_add_batches_until_the_levels_are_known() -> None:
    spy = SpyDenoiser()
    options = {"sigma_min": 0.1, "sigma_max": 10.0, "knots": 5, "batch_size": 4}
    data = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    once = optimize_schedule(spy, data, 4, **options)
    assert len(spy.calls) == 4
    more = optimize_schedule(spy, data, 4, rounds=20, **options)
    assert len(spy.calls) == 4 + 80
    assert float(more.error.max()) < 0.5 * float(once.error.max())
    tolerance = 1.1 * float(more.error.max())
    optimize_schedule(spy, data, 4, rounds=1000, tolerance=tolerance, **options)
    assert 84 + 20 < len(spy.calls) < 84 + 4 * 40


def test_an_interrupted_estimate_goes_on_where_it_stopped(tmp_path: Path) -> None:
    denoiser, data, path = EDMPrecond(GaussianNetwork(0.4)), gaussian_data(0.4, 50, 8), tmp_path / "schedule.pt"
    options = {"sigma_min": 0.02, "sigma_max": 8.0, "knots": 32, "batch_size": 4}
    whole = optimize_schedule(denoiser, data, 5, rounds=6, **options)
    first = optimize_schedule(denoiser, data, 5, rounds=2, path=path, **options)
    spy = SpyDenoiser()
    again = optimize_schedule(spy, data, 5, rounds=2, path=path, **options)
    assert spy.calls == []
    assert torch.equal(again.sigmas, first.sigmas)
    resumed = optimize_schedule(denoiser, data, 5, rounds=6, path=path, **options)
    assert torch.equal(resumed.sigmas, whole.sigmas)
    assert torch.equal(resumed.cost_error, whole.cost_error)
    with pytest.raises(ValueError, match=r"path: .* holds an estimate with"):
        optimize_schedule(denoiser, data, 5, path=path, **{**options, "knots": 33})


class Interrupted(EDMPrecond):
    """Exact for data N(0, .4^2) until its last call, which is torn."""

    def __init__(self, calls: int) -> None:
        super().__init__(GaussianNetwork(0.4))
        self.left = calls

    def raw(self, x: Tensor, sigma: Tensor, **conditioning: object) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().raw(x, sigma, **conditioning)


class Shuffled:
    """Batches of two sizes in an order that differs from pass to pass, and is the same in every run of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = gaussian_data(0.4, 50, 8).split(4)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.batches[i] for i in torch.randperm(len(self.batches), generator=self.generator).tolist())


def same_schedule(a: Schedule, b: Schedule) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("sigmas", "knots", "cost", "cost_error", "error"))


def loader() -> DataLoader:
    return DataLoader(gaussian_data(0.4, 50, 8), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("make", [lambda: gaussian_data(0.4, 50, 8), lambda: Shuffled(3), loader], ids=["tensor", "stream", "loader"])
@pytest.mark.parametrize("calls", [1, 2, 15, 16, 17, 40])
def test_an_estimate_torn_at_any_call_ends_with_the_same_bits(tmp_path: Path, make: Callable[[], object], calls: int) -> None:
    """15 intervals a round: torn in the first call, inside of a round, in its last call and in the one after."""
    path, options = tmp_path / "schedule.pt", {"sigma_min": 0.02, "sigma_max": 8.0, "knots": 16, "rounds": 3}
    if isinstance(make(), Tensor):
        options["batch_size"] = 4
    whole = optimize_schedule(EDMPrecond(GaussianNetwork(0.4)), make(), 5, **options)
    with pytest.raises(KeyboardInterrupt):
        optimize_schedule(Interrupted(calls), make(), 5, path=path, **options)
    assert path.exists() == (calls > 1)
    rest = Interrupted(0)
    resumed = optimize_schedule(rest, make(), 5, path=path, **options)
    assert -rest.left == 45 - (calls - 1), "a batch that was counted is not evaluated again"
    assert same_schedule(resumed, whole)


def test_a_run_that_has_ended_by_its_tolerance_is_not_taken_further(tmp_path: Path) -> None:
    options = {"sigma_min": 0.1, "sigma_max": 10.0, "knots": 5, "batch_size": 4, "rounds": 1000, "path": tmp_path / "schedule.pt"}
    spy, data = SpyDenoiser(), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    ended = optimize_schedule(spy, data, 4, tolerance=0.2, **options)
    assert 4 < len(spy.calls) < 400
    assert same_schedule(optimize_schedule(Interrupted(1), data, 4, tolerance=0.2, **options), ended)


def test_a_stream_must_give_again_what_was_counted(tmp_path: Path) -> None:
    path, options = tmp_path / "schedule.pt", {"sigma_min": 0.02, "sigma_max": 8.0, "knots": 16}
    with pytest.raises(KeyboardInterrupt):
        optimize_schedule(Interrupted(9), Shuffled(3), 5, path=path, **options)
    before = path.read_bytes()
    seen = list(Shuffled(3))
    for other in ([*seen[:7], *seen[8:]], [*seen[:3], seen[3][:2], *seen[4:]]):
        with pytest.raises(
            ValueError, match=r"data must give the 8 batches again that '.*' has counted, and in their order; it gave others"
        ):
            optimize_schedule(EDMPrecond(GaussianNetwork(0.4)), other, 5, path=path, **options)
    for other in (Shuffled(4), list(gaussian_data(0.4, 50, 8).split(5))):
        with pytest.raises(ValueError, match=r"'first batch and its conditioning': .*\. A stream that shuffles needs a seed"):
            optimize_schedule(EDMPrecond(GaussianNetwork(0.4)), other, 5, path=path, **options)
    with pytest.raises(ValueError, match=r"path: .* holds an estimate with .*'data': 'a stream'.*, got .*'data': \[50, 8\]"):
        optimize_schedule(EDMPrecond(GaussianNetwork(0.4)), gaussian_data(0.4, 50, 8), 5, path=path, **options)
    assert path.read_bytes() == before
    torch.save({"generator": {}}, path)
    with pytest.raises(ValueError, match=r"path: '.*' must hold an estimate that optimize_schedule of this version has saved"):
        optimize_schedule(EDMPrecond(GaussianNetwork(0.4)), Shuffled(3), 5, path=path, **options)


def test_a_cost_that_is_not_finite_never_reaches_the_file(tmp_path: Path) -> None:
    class Breaking(SpyDenoiser):
        def raw(self, x: Tensor, sigma: Tensor) -> Tensor:
            return super().raw(x, sigma) * (1.0 if len(self.calls) < 3 else float("nan"))

    path, options = tmp_path / "schedule.pt", {"sigma_min": 0.1, "sigma_max": 8.0, "knots": 9}
    data, breaking = torch.ones(4, 3), Breaking()
    with pytest.raises(ValueError, match=r"denoiser.raw gives a cost of nan between sigma"):
        optimize_schedule(breaking, data, 3, path=path, **options)
    assert len(breaking.calls) == 3
    whole = optimize_schedule(SpyDenoiser(), data, 3, **options)
    assert same_schedule(optimize_schedule(SpyDenoiser(), data, 3, path=path, **options), whole)


def test_single_samples_have_no_standard_error() -> None:
    schedule = optimize_schedule(
        EDMPrecond(GaussianNetwork(0.4)), gaussian_data(0.4, 50, 8), 5, sigma_min=0.02, sigma_max=8.0, knots=16, batch_size=1
    )
    assert schedule.cost_error.isinf().all()
    assert schedule.error.tolist() == [0.0, *[math.inf] * 3, 0.0, 0.0]


def test_batches_may_be_streamed_with_their_conditioning() -> None:
    spy = SpyDenoiser()
    stream = [(100.0 * torch.full((size, 3), float(size)), {"place": torch.full((size,), float(size))}) for size in (2, 5, 3)]
    optimize_schedule(spy, stream, 3, sigma_min=0.01, sigma_max=0.1, knots=8, conditioning={"mode": "a"})
    sizes = [len(x) // 2 for x, _, _ in spy.calls]
    assert sizes == [2, 5, 3, 2, 5, 3, 2]
    for x, _, arguments in spy.calls:
        assert arguments["mode"] == "a"
        assert (x - 100.0 * arguments["place"][:, None]).abs().max() < 1
