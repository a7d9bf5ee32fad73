"""EDM preconditioning: the formula, the forms sigma comes in, dtypes, derivatives, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastdiff_kernels.diffusion import EDMPrecond

from .oracles import GaussianNetwork, gaussian_denoiser


def network(x: Tensor, noise_level: Tensor, class_labels: Tensor | None = None) -> Tensor:
    shift = 0 if class_labels is None else class_labels.to(x.dtype)[:, None]
    return torch.sin(3 * x) + noise_level[:, None].to(x.dtype) + shift


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_denoised_is_the_formula(sigma_data: float) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    sigma = torch.tensor([0.002, 0.3, 1.7, 80.0], dtype=torch.float64)
    s, d = sigma[:, None], sigma_data
    c_skip, c_out, c_in = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt(), 1 / (s**2 + d**2).sqrt()
    raw = network(c_in * x, sigma.log() / 4)
    denoiser = EDMPrecond(network, sigma_data)
    torch.testing.assert_close(denoiser.raw(x, sigma), raw)
    torch.testing.assert_close(denoiser(x, sigma), c_skip * x + c_out * raw)


@pytest.mark.parametrize("c", [0.3, 0.5, 2.0])
def test_exact_gaussian_score_gives_the_posterior_mean(c: float) -> None:
    x, sigma = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0.01, 0.1, 1.0, 10.0, 80.0], dtype=torch.float64)
    torch.testing.assert_close(EDMPrecond(GaussianNetwork(c))(x, sigma), gaussian_denoiser(c)(x, sigma))


@pytest.mark.parametrize("sigma", [1, 1.0, torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64), torch.ones(3)])
def test_sigma_may_be_a_number_a_scalar_tensor_or_one_per_sample(sigma: object) -> None:
    x = torch.randn(3, 4)
    torch.testing.assert_close(EDMPrecond(network)(x, sigma), EDMPrecond(network)(x, torch.ones(3)), check_dtype=False)


def test_network_sees_its_samples_dtype_and_a_float32_noise_level() -> None:
    seen: list[tuple[torch.dtype, torch.dtype, torch.Size]] = []

    def spy(x: Tensor, noise_level: Tensor) -> Tensor:
        seen.append((x.dtype, noise_level.dtype, noise_level.shape))
        return x

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        EDMPrecond(spy)(torch.ones(2, 3, dtype=dtype), 0.7)
    assert seen == [
        (torch.float32, torch.float32, torch.Size([2])),
        (torch.bfloat16, torch.float32, torch.Size([2])),
        (torch.float64, torch.float64, torch.Size([2])),
    ]


@pytest.mark.parametrize(
    ("x", "head", "result"), [("float32", "bfloat16", "float32"), ("bfloat16", "float32", "float32"), ("float16",) * 3]
)
def test_result_has_the_wider_of_the_samples_and_the_networks_dtype(x: str, head: str, result: str) -> None:
    denoiser = EDMPrecond(lambda x, noise_level: x.to(getattr(torch, head)))
    samples = torch.ones(2, 3, dtype=getattr(torch, x))
    assert denoiser(samples, 1.0).dtype == denoiser.raw(samples, 1.0).dtype == getattr(torch, result)


def test_conditioning_reaches_the_network() -> None:
    x, labels = torch.randn(2, 4), torch.tensor([3, 5])
    denoiser = EDMPrecond(network)
    difference = denoiser.raw(x, 1.0, class_labels=labels) - denoiser.raw(x, 1.0)
    torch.testing.assert_close(difference, labels[:, None].expand(2, 4).float())


def test_parameters_of_the_network_are_its_own() -> None:
    inner = nn.Linear(3, 3)
    assert list(EDMPrecond(inner).parameters()) == list(inner.parameters())


def test_empty_batch() -> None:
    assert EDMPrecond(network)(torch.empty(0, 4), 1.0).shape == (0, 4)
    assert EDMPrecond(network)(torch.empty(0, 4), torch.empty(0)).shape == (0, 4)


def test_compiles_without_a_break_and_differentiates_forward_through_sigma() -> None:
    denoiser, x, sigma = EDMPrecond(network), torch.randn(3, 4), torch.tensor([0.1, 1.0, 5.0])
    torch.testing.assert_close(torch.compile(denoiser, fullgraph=True, backend="eager")(x, sigma), denoiser(x, sigma))
    tangent = torch.func.jvp(lambda s: denoiser(x.double(), s), (sigma.double(),), (torch.ones(3, dtype=torch.float64),))[1]
    h = 1e-6
    numeric = (denoiser(x.double(), sigma.double() + h) - denoiser(x.double(), sigma.double() - h)) / (2 * h)
    torch.testing.assert_close(tangent, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("x", "sigma", "error", "message"),
    [
        (torch.ones(2, 3), 0.0, ValueError, "sigma must be positive"),
        (torch.ones(2, 3), float("nan"), ValueError, "sigma must be positive"),
        (torch.ones(2, 3), torch.tensor([1.0, -1.0]), ValueError, "sigma must be positive"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"shape \[2\], got shape \[3\]"),
        (torch.ones(2, 3), torch.ones(2, 1), ValueError, r"got shape \[2, 1\]"),
        (torch.ones(2, 3), torch.ones(2, device="meta"), ValueError, "sigma must be on cpu"),
        (torch.ones(2, 3), torch.ones(2, dtype=torch.int64), TypeError, "sigma must be floating-point"),
        (torch.ones(2, 3), "1", TypeError, "sigma must be a number, got str"),
        (torch.ones(2, 3), True, TypeError, "sigma must be a number, got bool"),
        (torch.ones(2, 3, dtype=torch.int64), 1.0, TypeError, "x must be a floating-point tensor"),
        (torch.tensor(1.0), 1.0, ValueError, r"x must have shape \[B, ...\]"),
        ([1.0], 1.0, TypeError, "x must be a tensor, got list"),
    ],
)
def test_bad_input_is_named(x: object, sigma: object, error: type[Exception], message: str) -> None:
    denoiser = EDMPrecond(network)
    for call in (denoiser, denoiser.raw):
        with pytest.raises(error, match=message):
            call(x, sigma)


def test_bad_construction_is_named() -> None:
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        EDMPrecond(network, 0.0)
    with pytest.raises(TypeError, match="network must be callable"):
        EDMPrecond(3)
    with pytest.raises(ValueError, match="network must return a tensor of x's shape"):
        EDMPrecond(lambda x, noise_level: x[:, :1])(torch.ones(2, 3), 1.0)
