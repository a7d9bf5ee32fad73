"""Predictor-optimised schedules: the cost against closed forms, and levels of equal cost."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastdiff_kernels import ops
from fastdiff_kernels.diffusion import EDMPrecond, optimize_schedule
from fastdiff_kernels.diffusion.costs import predictor_costs

from .oracles import GaussianNetwork, column


def gaussian_predictor_cost(c: float, d: int, high: float, low: float) -> float:
    """L_p = low^2 d h^4 c^4 / (V^2 a^2 V V'^2), h = low - high, V = c^2 + sigma^2, a = 1 + h high / V."""
    h, before, after = low - high, c**2 + high**2, c**2 + low**2
    return low**2 * d * h**4 * c**4 / (before**3 * (1 + h * high / before) ** 2 * after**2)


class MixtureNetwork(nn.Module):
    """F of the exact score of the mixture of N(+m, s^2) and N(-m, s^2) in each coordinate, sigma_data = .5."""

    def __init__(self, m: float, s: float) -> None:
        super().__init__()
        self.m, self.s = m, s

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        sigma = column((4 * noise_level).exp(), x)
        x = x * (sigma**2 + 0.25).sqrt()
        score = mixture_score(x, sigma, self.m, self.s)
        return (score + x / (sigma**2 + 0.25)) * sigma * (sigma**2 + 0.25).sqrt() / 0.5


def mixture_score(x: Tensor, sigma: Tensor, m: float, s: float) -> Tensor:
    variance = s**2 + sigma**2
    return (m * torch.tanh(m * x / variance) - x) / variance


@settings(max_examples=20, deadline=None)
@given(c=st.floats(0.3, 1.5), high=st.floats(0.3, 20.0), ratio=st.floats(0.55, 0.95))
def test_cost_of_a_gaussian(c: float, high: float, ratio: float) -> None:
    clean = c * torch.randn(4000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    costs = predictor_costs(EDMPrecond(GaussianNetwork(c)), clean, {}, ratio * high, high, 1, 0)
    assert costs.shape == (4000,)
    assert costs.mean().item() == pytest.approx(gaussian_predictor_cost(c, 5, high, ratio * high), rel=0.1)


@pytest.mark.parametrize(("m", "s", "high", "low"), [(1.0, 0.4, 1.0, 0.8), (0.7, 0.5, 0.6, 0.4)])
def test_cost_of_a_mixture(m: float, s: float, high: float, low: float) -> None:
    """In one dimension a probe of random sign is exact: sample by sample against derivatives of the closed form."""
    signs = torch.randint(0, 2, (64, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    clean = (m * signs + s * torch.randn(64, 1, generator=torch.Generator().manual_seed(1))).double()
    costs = predictor_costs(EDMPrecond(MixtureNetwork(m, s)), clean, {}, low, high, 5, 3)
    x = ops.lcss_perturb(clean, high, 5, offset=3)
    reach = (low - high) * high

    def score(value: Tensor, sigma: float) -> Tensor:
        return mixture_score(value, torch.tensor(sigma, dtype=torch.float64), m, s)

    def log_det(value: Tensor) -> Tensor:
        return torch.log(1 - reach * torch.func.grad(lambda v: score(v, high))(value))

    slope = torch.vmap(torch.func.grad(lambda v: score(v, high)))(x[:, 0])
    turned = torch.vmap(torch.func.grad(log_det))(x[:, 0])
    moved = (score(x[:, 0], high) - turned) / (1 - reach * slope)
    residual = score(x[:, 0] - reach * score(x[:, 0], high), low) - moved
    torch.testing.assert_close(costs, low**2 * residual**2, rtol=1e-6, atol=1e-9 * float((low * residual).square().max()))


def test_probes_estimate_the_trace_without_bias() -> None:
    """In eight dimensions a probe is noisy, and the product of two is not: coordinates are independent, so that costs add up."""
    denoiser = EDMPrecond(MixtureNetwork(1.0, 0.4))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (6000, 8), generator=generator) * 2.0 - 1
    clean = (signs + 0.4 * torch.randn(6000, 8, generator=generator)).double()
    together = predictor_costs(denoiser, clean, {}, 0.5, 0.8, 1, 0)
    alone = predictor_costs(denoiser, clean.reshape(-1, 1), {}, 0.5, 0.8, 1, 0)
    error = (together.var() / len(together)).sqrt() + 8 * (alone.var() / len(alone)).sqrt()
    assert together.mean().item() == pytest.approx(8 * alone.mean().item(), abs=4 * error.item())
    assert 4 * error < 0.2 * together.mean()


def test_levels_of_equal_predictor_cost() -> None:
    """Levels move to equal sums of fourth roots, and after a few rounds all steps cost the same."""
    denoiser = EDMPrecond(GaussianNetwork(0.5))
    data = (0.5 * torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))).double()
    schedule = optimize_schedule(
        denoiser, data, 13, sigma_min=0.1, sigma_max=10.0, cost="predictor", rounds=15, tolerance=0.02, batch_size=64
    )
    levels = schedule.sigmas[:-1].tolist()
    costs = [gaussian_predictor_cost(0.5, 64, high, low) for high, low in pairwise(levels)]
    assert max(costs) < 1.5 * min(costs)
    uniform = [10 * 0.01 ** (i / 12) for i in range(13)]
    before = [gaussian_predictor_cost(0.5, 64, high, low) for high, low in pairwise(uniform)]
    assert max(before) > 50 * min(before)
    assert schedule.cost.shape == schedule.cost_error.shape == (12,)
    assert math.isclose(levels[0], 10.0)
    assert levels[-1] == 0.1


class Counting(EDMPrecond):
    """Exact for data N(0, .5^2); counts its calls, two an interval, and tears the one that `torn` names."""

    def __init__(self, torn: int = 0) -> None:
        super().__init__(GaussianNetwork(0.5))
        self.calls, self.torn = 0, torn

    def raw(self, x: Tensor, sigma: Tensor, **conditioning: object) -> Tensor:
        self.calls += 1
        if self.calls == self.torn:
            raise KeyboardInterrupt
        return super().raw(x, sigma, **conditioning)


def exact_rounds(root: float, damping: float, rounds: int) -> list[float]:
    """Largest over smallest cost after each of so many moves of damping of the way to equal sums of cost^root, costs in closed form."""

    def costs(levels: Tensor) -> Tensor:
        pairs = pairwise(levels.tolist())
        return torch.tensor([gaussian_predictor_cost(0.5, 64, high, low) for high, low in pairs], dtype=torch.float64)

    levels = torch.tensor([10 * 0.01 ** (i / 12) for i in range(13)], dtype=torch.float64)
    ratios = []
    for _ in range(rounds):
        # integrate_schedule takes square roots
        target = ops.integrate_schedule(levels, costs(levels) ** (2 * root), 12)
        levels = torch.lerp(levels.log(), target.log(), damping).exp()
        ratios.append(float(costs(levels).max() / costs(levels).min()))
    return ratios


def test_undamped_moves_to_equal_sums_of_roots_overshoot_and_to_those_of_fourth_roots_do_not() -> None:
    """Costs are of fourth order in the step: their roots, of second order, ask for twice the way in each move."""
    roots, fourth = exact_rounds(1 / 2, 1.0, 100), exact_rounds(1 / 4, 1.0, 10)
    assert max(roots[:2]) > 1000
    assert min(roots) > 2
    assert fourth[1] < 1.1
    assert fourth[-1] < 1 + 1e-6
    # Half of a way that is twice too long is the way.
    assert exact_rounds(1 / 2, 0.5, 10)[-1] < 1 + 1e-6


def test_tolerance_ends_the_rounds() -> None:
    data = (0.5 * torch.randn(400, 64, generator=torch.Generator().manual_seed(0))).double()
    options = {"sigma_min": 0.1, "sigma_max": 10.0, "cost": "predictor", "batch_size": 16}
    stopped, exact = Counting(), Counting()
    found = optimize_schedule(stopped, data, 7, rounds=12, tolerance=0.05, **options)
    rounds = stopped.calls // 12
    assert 1 < rounds < 6
    assert stopped.calls == 12 * rounds
    assert torch.equal(found.sigmas, optimize_schedule(exact, data, 7, rounds=rounds, **options).sigmas)
    assert exact.calls == stopped.calls, "without a tolerance every round is taken"

    def last_move(rounds: int) -> float:
        schedule = optimize_schedule(Counting(), data, 7, rounds=rounds, **options)
        return float((schedule.sigmas[:-1].log() - schedule.knots.log()).abs().max())

    assert last_move(rounds) <= 0.05 < last_move(rounds - 1)


@pytest.mark.parametrize("damping", [0.25, 0.5])
def test_damping_is_the_share_of_the_way_that_levels_move(damping: float) -> None:
    data = 0.5 * torch.randn(50, 8, dtype=torch.float64)
    options = {"sigma_min": 0.1, "sigma_max": 10.0, "cost": "predictor", "batch_size": 8, "rounds": 1}
    whole, part = (optimize_schedule(Counting(), data, 6, damping=share, **options) for share in (1.0, damping))
    start = whole.knots.log()
    assert torch.equal(part.knots, whole.knots)
    torch.testing.assert_close(part.sigmas[:-1].log() - start, damping * (whole.sigmas[:-1].log() - start))
    assert (whole.sigmas[1:-2].log() - start[1:-1]).abs().max() > 0.1


@pytest.mark.parametrize("torn", [0, 1, 2, 7, 10, 11, 25])
def test_an_estimate_torn_at_any_call_ends_with_the_same_bits(tmp_path: Path, torn: int) -> None:
    """Ten calls a round, two an interval; 0: ended after a round."""
    data, path = 0.5 * torch.randn(50, 8, dtype=torch.float64), tmp_path / "schedule.pt"
    options = {"sigma_min": 0.1, "sigma_max": 10.0, "cost": "predictor", "batch_size": 8, "damping": 0.5}
    whole = optimize_schedule(Counting(), data, 6, rounds=4, **options)
    if torn:
        with pytest.raises(KeyboardInterrupt):
            optimize_schedule(Counting(torn), data, 6, rounds=4, path=path, **options)
    else:
        optimize_schedule(Counting(), data, 6, rounds=1, path=path, **options)
    rest = Counting()
    resumed = optimize_schedule(rest, data, 6, rounds=4, path=path, **options)
    assert rest.calls == 40 - (2 * ((torn - 1) // 2) if torn else 10)
    assert torch.equal(resumed.sigmas, whole.sigmas)
    assert torch.equal(resumed.error, whole.error)
    assert resumed.error[1:-2].min() > 0
    again = Counting()
    assert torch.equal(optimize_schedule(again, data, 6, rounds=9, tolerance=10.0, path=path, **options).sigmas, whole.sigmas)
    assert again.calls == 0, "the levels moved by less than the tolerance in the last round"


@pytest.mark.parametrize("change", [{"damping": 0.25}, {"interpolation": "linear"}])
def test_levels_must_go_on_moving_as_they_did(tmp_path: Path, change: dict[str, object]) -> None:
    data = 0.5 * torch.randn(50, 8, dtype=torch.float64)
    options = {"sigma_min": 0.1, "sigma_max": 10.0, "cost": "predictor", "batch_size": 8, "damping": 0.5, "path": tmp_path / "schedule.pt"}
    optimize_schedule(Counting(), data, 6, rounds=1, **options)
    expected = r"holds an estimate with {'damping and interpolation': \(0.5, 'pchip'\)}, got {'damping and interpolation': \("
    with pytest.raises(ValueError, match=expected):
        optimize_schedule(Counting(), data, 6, rounds=2, **{**options, **change})


def test_probes_leave_no_gradients_behind() -> None:
    network = nn.Linear(3, 3).double()

    class Denoiser:
        sigma_data = 0.5

        def raw(self, x: Tensor, sigma: Tensor) -> Tensor:
            return torch.tanh(network(x))

    costs = predictor_costs(Denoiser(), torch.randn(5, 3, dtype=torch.float64), {}, 0.5, 0.6, 0, 0)
    assert costs.isfinite().all()
    assert not costs.requires_grad
    assert all(p.grad is None for p in network.parameters())
