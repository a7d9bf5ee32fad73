"""Every estimator against closed forms: Gaussians and mixtures of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastdiff_kernels.distill import score_estimators as estimators

SEED = 20241203


def generator(stream=0):
    return torch.Generator().manual_seed(SEED + stream)


class MixtureScore:
    """The score of an even mixture of N(+-mean, variance I), and its Jacobian's trace."""

    def __init__(self, mean, variance):
        self.mean, self.variance = torch.tensor(mean, dtype=torch.float64), variance

    def __call__(self, x):
        lean = (x @ self.mean / self.variance).tanh()[:, None]
        return (lean * self.mean - x) / self.variance

    def trace(self, x):
        lean = (x @ self.mean / self.variance).tanh()
        return (1 - lean**2) * self.mean.square().sum() / self.variance**2 - x.shape[1] / self.variance

    def objective(self, x):
        return self.trace(x) + 0.5 * self(x).square().sum(1)

    def sample(self, count):
        rng = generator(1)
        sign = 1 - 2 * torch.randint(0, 2, (count, 1), generator=rng)
        return sign * self.mean + math.sqrt(self.variance) * torch.randn(count, len(self.mean), dtype=torch.float64, generator=rng)


MIXTURE = MixtureScore([0.8, -0.5, 0.3], 0.5)


def within_noise(values, expected, deviations=4.5):
    """Whether the mean over values is expected's, as far as their scatter tells."""
    difference = (values - expected).double()
    return abs(difference.mean()) <= deviations * difference.std() / math.sqrt(len(difference))


def test_exact_score_matching_is_the_objective():
    x = MIXTURE.sample(50)
    torch.testing.assert_close(estimators.exact_score_matching(MIXTURE, x), MIXTURE.objective(x))


def test_a_score_that_is_the_same_everywhere_has_no_trace():
    x, bias = MIXTURE.sample(5), torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    for estimator in (estimators.exact_score_matching, estimators.sliced_score_matching):
        loss = estimator(lambda x: bias.expand_as(x), x)
        assert loss.tolist() == [3.0] * 5
        torch.testing.assert_close(torch.autograd.grad(loss.mean(), bias)[0], bias.detach())


@pytest.mark.parametrize("law", estimators.PROJECTIONS)
@pytest.mark.parametrize("projections", [1, 3])
def test_sliced_score_matching_is_unbiased(law, projections):
    x = MIXTURE.sample(4000)
    found = estimators.sliced_score_matching(MIXTURE, x, law=law, projections=projections, generator=generator())
    assert within_noise(found, MIXTURE.objective(x))


def test_rademacher_projections_are_exact_for_a_diagonal_jacobian():
    x = torch.randn(5, 4, dtype=torch.float64)
    found = estimators.sliced_score_matching(lambda x: -2 * x, x, law="rademacher")
    torch.testing.assert_close(found, -8 + 2 * x.square().sum(1))


def test_finite_differences_are_unbiased_for_a_small_radius():
    x = MIXTURE.sample(4000)
    found = estimators.finite_difference_score_matching(MIXTURE, x, radius=torch.full((4000,), 1e-3), generator=generator())
    assert within_noise(found, MIXTURE.objective(x))


def test_the_bias_of_finite_differences_falls_with_the_square_of_the_radius():
    x = MIXTURE.sample(4000)

    def bias(radius):
        found = [estimators.finite_difference_score_matching(MIXTURE, x, radius=r, generator=generator()) for r in (radius, 1e-3)]
        return (found[0] - found[1]).mean().abs().item()

    assert bias(0.1) == pytest.approx(4 * bias(0.05), rel=0.05)


def test_finite_differences_are_exact_for_a_linear_score():
    x = torch.randn(6, 3, dtype=torch.float64)
    found = estimators.finite_difference_score_matching(lambda x: -2 * x, x, radius=0.1, generator=generator())
    torch.testing.assert_close(found, -6 + 2 * x.square().sum(1))


@pytest.mark.parametrize(("spread", "sigma", "dimension", "gamma"), [(1.3, 0.6, 4, 1.0), (0.5, 2.0, 3, 0.4)])
@pytest.mark.parametrize("antithetic", [False, True])
def test_local_smoothing_on_a_gaussian(spread, sigma, dimension, gamma, antithetic):
    """Data N(0, c^2 I_d), s = -k x: J(k) = -gamma k d + k^2 d (c^2 + sigma^2) / 2."""
    x = spread * torch.randn(40000, dimension, dtype=torch.float64, generator=generator(1))
    k = 0.4
    found = estimators.local_curvature_smoothing(lambda x: -k * x, x, sigma, 7, gamma=gamma, antithetic=antithetic)
    expected = -gamma * k * dimension + 0.5 * k**2 * dimension * (spread**2 + sigma**2)
    assert within_noise(found, torch.tensor(expected))


def test_local_smoothing_agrees_with_the_exact_objective_where_the_noise_is_small():
    x, sigma = MIXTURE.sample(4000), 0.02
    found = estimators.local_curvature_smoothing(MIXTURE, x, sigma, 7, antithetic=True)
    assert within_noise(found, MIXTURE.objective(x))


def test_antithetic_pairs_remove_the_variance_that_grows_with_small_noise():
    x = MIXTURE.sample(2000)

    def spread(sigma, antithetic):
        return (estimators.local_curvature_smoothing(MIXTURE, x, sigma, 7, antithetic=antithetic) - MIXTURE.objective(x)).std().item()

    assert spread(0.01, False) > 8 * spread(0.1, False)
    assert spread(0.01, True) < 1.2 * spread(0.1, True)
    assert spread(0.01, True) < spread(0.01, False) / 20


def test_denoising_differs_from_local_smoothing_by_a_constant():
    """Mean |z|^2 / (2 sigma^2) = d / (2 sigma^2): the same minimiser."""
    sigma, k, x = 0.6, 0.4, 1.3 * torch.randn(40000, 4, dtype=torch.float64, generator=generator(1))
    denoising = estimators.denoising_score_matching(lambda x: -k * x, x, sigma, generator=generator())
    assert within_noise(denoising, torch.tensor(-k * 4 + 0.5 * k**2 * 4 * (1.3**2 + sigma**2) + 4 / (2 * sigma**2)))


ESTIMATORS = {
    "exact": (lambda s, x, sigma, step: estimators.exact_score_matching(s, x), False),
    "sliced": (lambda s, x, sigma, step: estimators.sliced_score_matching(s, x), False),
    "finite differences": (lambda s, x, sigma, step: estimators.finite_difference_score_matching(s, x, radius=0.05), False),
    "denoising": (lambda s, x, sigma, step: estimators.denoising_score_matching(s, x, sigma), True),
    "local": (lambda s, x, sigma, step: estimators.local_curvature_smoothing(s, x, sigma, step), True),
    "local pairs": (lambda s, x, sigma, step: estimators.local_curvature_smoothing(s, x, sigma, step, antithetic=True), True),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_learns_the_score_of_an_anisotropic_gaussian(name):
    """A linear score trained by each ends at minus the inverse covariance, that of the smoothed data where noise is added."""
    torch.manual_seed(0)
    estimate, smooths = ESTIMATORS[name]
    sigma, scales = 0.5, torch.tensor([1.0, 0.6])
    model = nn.Linear(2, 2, bias=False)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 250)
    for step in range(250):
        loss = estimate(model, scales * torch.randn(512, 2), sigma, step).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    expected = torch.diag(-1 / (scales**2 + smooths * sigma**2))
    assert (model.weight - expected).abs().max() < 0.12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, x: estimators.sliced_score_matching(s, x, projections=0), ValueError, "projections must be at least 1, got 0"),
        (lambda s, x: estimators.sliced_score_matching(s, x, law="cube"), ValueError, "law must be one of 'gaussian', .* got 'cube'"),
        (
            lambda s, x: estimators.finite_difference_score_matching(s, x, radius=0.0),
            ValueError,
            "radius must be finite and > 0.0, got 0.0",
        ),
        (lambda s, x: estimators.finite_difference_score_matching(s, x, radius="1"), TypeError, "radius must be a number, got str"),
        (lambda s, x: estimators.denoising_score_matching(s, x, math.inf), ValueError, "sigma must be finite and > 0.0, got inf"),
        (
            lambda s, x: estimators.denoising_score_matching(s, x, torch.ones(3)),
            ValueError,
            r"sigma must be .* tensor \[2\], got shape \[3\]",
        ),
        (
            lambda s, x: estimators.denoising_score_matching(s, x, torch.tensor([1.0, math.nan])),
            ValueError,
            r"sigma must be .*, got \[1.0, nan\]",
        ),
        (lambda s, x: estimators.local_curvature_smoothing(s, x, -1.0, 0), ValueError, "sigma must be finite and at least 0; got -1.0"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(lambda x: -x, torch.zeros(2, 3))
