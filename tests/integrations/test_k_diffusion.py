"""k-diffusion's wrappers as denoisers, and denoisers in a loop of its kind."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fastdiff_kernels.diffusion import EDMPrecond, Schedule, optimize_schedule, sample
from fastdiff_kernels.integrations import k_diffusion


class Wrapper(nn.Module):
    """A denoiser wrapper: inner_model(x c_in, sigma) with EDM's scalings, for data N(0, 0.7^2)."""

    sigma_data = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: object) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return x * 0.49 / (0.49 + s**2) + self.weight.to(x.dtype)


def sample_euler(model, x: Tensor, sigmas: Tensor, extra_args: dict | None = None) -> Tensor:
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {}))
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def test_a_wrapper_is_a_denoiser_with_the_raw_output_of_edm() -> None:
    denoiser = k_diffusion.as_denoiser(Wrapper())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(denoiser(x, 1.5), x * 0.49 / (0.49 + 2.25))
    v = 2.25 + 0.25
    torch.testing.assert_close(denoiser.raw(x, 1.5) * 0.75 / math.sqrt(v) + 0.25 / v * x, denoiser(x, 1.5).detach())
    assert denoiser.sigma_data == 0.5
    assert k_diffusion.as_denoiser(Wrapper(), sigma_data=2.0).sigma_data == 2.0


def test_a_schedule_is_optimised_from_it_and_sampled_in_their_loop() -> None:
    denoiser = k_diffusion.as_denoiser(Wrapper())
    schedule = optimize_schedule(denoiser, 0.7 * torch.randn(64, 3, 4, 4), 6, sigma_min=0.05, sigma_max=20, knots=16)
    noise = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        theirs = sample_euler(Wrapper(), noise * float(schedule.sigmas[0]), schedule.to_k_diffusion())
    torch.testing.assert_close(sample(denoiser, noise, schedule, solver="euler").samples, theirs, rtol=1e-4, atol=1e-5)


def test_a_denoiser_of_ours_runs_in_their_loop() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor, noise_level: Tensor, class_labels: Tensor) -> Tensor:
            return x * class_labels.view(-1, 1, 1, 1)

    denoiser, schedule = EDMPrecond(Network()), Schedule.karras(5, 0.1, 10.0)
    labels, noise = torch.tensor([0.1, 0.2]), torch.randn(2, 3, 4, 4)
    theirs = sample_euler(denoiser, noise * 10.0, schedule.to_k_diffusion(), {"class_labels": labels})
    ours = sample(denoiser, noise, schedule, solver="euler", conditioning={"class_labels": labels}).samples
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_what_is_no_wrapper_is_refused() -> None:
    with pytest.raises(TypeError, match=r"wrapper must be a torch.nn.Module, got function"):
        k_diffusion.as_denoiser(sample_euler)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        k_diffusion.as_denoiser(Wrapper(), sigma_data=-1.0)
