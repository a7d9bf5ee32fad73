from __future__ import annotations

import pytest
import torch

from fastdiff_kernels.distill import KarrasUniform, LogNormal


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.3, 0.5)])
def test_log_normal_moments(mean, std):
    sigma = LogNormal(mean, std)(100_000, rng())
    assert sigma.dtype == torch.float32
    assert sigma.shape == (100_000,)
    assert sigma.log().mean().item() == pytest.approx(mean, abs=5 * std / 100_000**0.5)
    assert sigma.log().std().item() == pytest.approx(std, rel=0.01)


def test_karras_uniform_covers_the_generator_range_of_sid():
    sigma = KarrasUniform()(100_000, rng())
    assert sigma.min().item() == pytest.approx(0.002, rel=1e-2)
    assert sigma.max().item() == pytest.approx(24.41, rel=1e-3)


def test_karras_uniform_is_uniform_in_its_root():
    sigma = KarrasUniform(0.1, 10.0, rho=3.0, u_max=1.0)(50_000, rng())
    u = (sigma ** (1 / 3) - 0.1 ** (1 / 3)) / (10 ** (1 / 3) - 0.1 ** (1 / 3))
    assert torch.histc(u, 10, 0, 1).sub(5_000).abs().max() < 5 * 5_000**0.5


def test_laws_follow_their_generator():
    assert torch.equal(LogNormal()(8, rng(3)), LogNormal()(8, rng(3)))
    assert not torch.equal(LogNormal()(8, rng(3)), LogNormal()(8, rng(4)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(std=0.0), "std must be finite and > 0"),
        (lambda: LogNormal(mean=float("inf")), "mean must be finite"),
        (lambda: KarrasUniform(sigma_min=0.0), "sigma_min must be finite and > 0"),
        (lambda: KarrasUniform(sigma_min=2.0, sigma_max=1.0), "sigma_max must be finite and > 2"),
        (lambda: KarrasUniform(u_max=1.5), "u_max must be finite .* <= 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
