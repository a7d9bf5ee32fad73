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
    """Levels move to equal sums of fourth roots, and after a few rounds all steps cost the same: equal sums of roots overshoot for ever."""
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


def test_an_interrupted_estimate_goes_on_where_it_stopped(tmp_path: Path) -> None:
    denoiser, data = EDMPrecond(GaussianNetwork(0.5)), 0.5 * torch.randn(50, 8, dtype=torch.float64)
    options = {"sigma_min": 0.1, "sigma_max": 10.0, "cost": "predictor", "batch_size": 8, "damping": 0.5}
    whole = optimize_schedule(denoiser, data, 6, rounds=4, **options)
    optimize_schedule(denoiser, data, 6, rounds=1, path=tmp_path / "p.pt", **options)
    resumed = optimize_schedule(denoiser, data, 6, rounds=4, path=tmp_path / "p.pt", **options)
    assert torch.equal(resumed.sigmas, whole.sigmas)
    assert torch.equal(resumed.error, whole.error)
    assert resumed.error[1:-2].min() > 0


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
