"""The laws noise levels are drawn from."""

from __future__ import annotations

import math

import pytest
import torch

from fastdiff_kernels.diffusion import edm_weight, karras_sigmas, lognormal_sigmas, loguniform_sigmas, uniform_karras_sigmas

COUNT = 40_000


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 0.3)])
def test_lognormal_law(mean: float, std: float) -> None:
    logs = lognormal_sigmas(COUNT, mean=mean, std=std, generator=generator()).double().log()
    assert abs(logs.mean() - mean) < 4 * std / math.sqrt(COUNT)
    assert abs(logs.std() - std) < 4 * std / math.sqrt(2 * COUNT)


def test_loguniform_law() -> None:
    u = loguniform_sigmas(COUNT, sigma_min=0.1, sigma_max=10.0, generator=generator()).double().log() / math.log(10.0)
    assert u.min() >= -1.0001
    assert u.max() <= 1.0001
    assert abs(u.mean()) < 4 / math.sqrt(3 * COUNT)
    assert abs(u.square().mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / COUNT)


def test_karras_map_runs_from_the_clean_to_the_noisy_end() -> None:
    u = torch.linspace(0, 1, 9, dtype=torch.float64)
    sigmas = karras_sigmas(u, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([0.01, 50.0], dtype=torch.float64))
    torch.testing.assert_close(sigmas.pow(1 / 5).diff(), sigmas.pow(1 / 5).diff().mean().expand(8))


def test_default_uniform_karras_law_is_the_one_sid_trains_generators_with() -> None:
    sigmas = uniform_karras_sigmas(COUNT, generator=generator())
    assert sigmas.min() >= 0.002
    assert sigmas.max() == pytest.approx(24.41, abs=0.01)
    assert sigmas.median() == pytest.approx(float(karras_sigmas(torch.tensor(0.4))), rel=0.03)


@pytest.mark.parametrize("sigma_data", [0.5, 1.1])
def test_edm_weight_cancels_c_out(sigma_data: float) -> None:
    sigma = torch.tensor([0.01, 1.0, 30.0], dtype=torch.float64)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    torch.testing.assert_close(edm_weight(sigma, sigma_data) * c_out**2, torch.ones_like(sigma))


@pytest.mark.parametrize("law", [lognormal_sigmas, loguniform_sigmas, uniform_karras_sigmas])
def test_draws_repeat_with_their_generator_and_may_be_none(law: object) -> None:
    assert torch.equal(law(7, generator=generator()), law(7, generator=generator()))
    assert law(3).dtype == torch.float32
    assert law(0).shape == (0,)
    with pytest.raises(ValueError, match="count must be at least 0"):
        law(-1)
    with pytest.raises(TypeError, match="count must be an int"):
        law(2.0)


def test_bad_ranges_are_named() -> None:
    with pytest.raises(ValueError, match="std must be positive"):
        lognormal_sigmas(2, std=0.0)
    with pytest.raises(ValueError, match="sigma_min must be below sigma_max"):
        loguniform_sigmas(2, sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="u_max must be at most 1"):
        uniform_karras_sigmas(2, u_max=1.5)
    with pytest.raises(ValueError, match="rho must be positive"):
        karras_sigmas(torch.tensor(0.5), rho=0.0)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        edm_weight(torch.tensor(0.5), -1.0)
