"""The demo's samplers, on a Gaussian whose denoiser is known."""

import math
from itertools import pairwise

import pytest
import torch

from fastdiff_kernels.demo.samplers import EvenSkip, ancestral, one_call, psnr, solve
from fastdiff_kernels.diffusion import Schedule

C = 0.5
LABELS = torch.zeros(4000, dtype=torch.int64)


def denoiser(x, sigma, class_labels=None):
    """Takes noise levels in the one form that samplers promise: float32 [B]."""
    sigma = sigma.view(x.shape[0], *[1] * (x.dim() - 1))
    return C**2 / (C**2 + sigma**2) * x


def noise(n=4000):
    return torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_one_call_evaluates_the_generator_once_at_sigma_init():
    samples, calls = one_call(denoiser, LABELS, 2.5)(noise(), 0)
    assert calls == 1
    torch.testing.assert_close(samples, C**2 / (C**2 + 2.5**2) * 2.5 * noise())


def test_ancestral_sampling_with_the_exact_denoiser_nears_the_data_with_more_steps():
    def std(steps):
        sigmas = [C * math.tan(math.atan(80 / C) * i / steps) for i in range(steps, 0, -1)]
        samples, calls = ancestral(denoiser, LABELS, sigmas, seed=0)(noise(), 0)
        assert calls == steps
        return float(samples.std())

    errors = [abs(std(k) - C) for k in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


def test_ancestral_sampling_repeats_and_differs_between_sets():
    run = ancestral(denoiser, LABELS, [80.0, 1.0, 0.2], seed=1)
    assert torch.equal(run(noise(), 0)[0], run(noise(), 0)[0])
    assert not torch.equal(run(noise(), 0)[0], run(noise(), 1)[0])


@pytest.mark.parametrize("calls", [1, 7, 13, 20])
def test_an_even_stride_costs_exactly_the_calls_asked_for(calls):
    patterns = []
    skip = EvenSkip(every=1, calls=calls, steps=20)
    _, nfe = solve(denoiser, LABELS[:8], Schedule.karras(20, 0.02, 80.0), "euler", skip, patterns)(noise(8), 0)
    assert nfe == calls
    computed = [step for step, skipped in enumerate(patterns[0]) if not skipped]
    assert len(computed) == calls
    assert computed[0] == 0
    gaps = {b - a for a, b in pairwise(computed)}
    assert len(gaps) <= 2


def test_an_even_stride_of_no_calls_is_refused():
    with pytest.raises(ValueError, match="calls must be from 1 to steps=20, got 21"):
        EvenSkip(every=1, calls=21, steps=20)


def test_psnr_is_in_pixel_units():
    reference = torch.zeros(3, 1, 4, 4)
    assert psnr(reference + 0.1, reference, scale=1.0) == pytest.approx(20, abs=1e-4)
    assert psnr(reference + 0.2, reference, scale=0.5) == pytest.approx(20, abs=1e-4)
    assert psnr(reference, reference, scale=1.0) == math.inf
