"""Triton kernels of the sampling steps against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_kernels.reference import philox
from fastdiff_kernels.triton import _sums, sampling
from tests.helpers import FLOATS, assert_bitwise
from tests.triton.accuracy import check, constants, normals
from tests.triton.drawing import few_examples, laid_out, shapes
from tests.triton.running import check_budgets, run_interpreted

# Every dtype once, every kind of shape once: the interpreter is slow.
CASES = [((2, 5, 6), dtype) for dtype in FLOATS] + [(shape, torch.bfloat16) for shape in ((1, _sums.CHUNK + 1), (4,), (0, 5))]


def levels(batch, dtype, device):
    """sigma_s [B] below sigma_t [1], some of them 0 and some equal to it."""
    (upper,) = constants(batch, dtype, device, [1])
    share = torch.tensor([0.5, 0.0, 1.0, 0.999], device=device, dtype=upper.dtype)[:batch]
    return share * upper, upper


@pytest.mark.executes
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_posterior_sample_is_as_accurate_as_the_definition(shape, dtype, device):
    (denoised, noisy, grad), seed = normals(shape, dtype, device, 3), torch.tensor(-7, device=device)
    lower, upper = levels(shape[0], dtype, device)
    check(sampling, "posterior_sample", (denoised, noisy, lower, upper, seed, 2**33))
    for needs in ([True, True], [True, False], [False, True]):
        check(sampling, "posterior_sample_backward", (grad, denoised, noisy, lower, upper, seed, 2**33, needs))


@pytest.mark.executes
def test_posterior_draws_from_its_own_stream(device):
    zero, one = torch.zeros(2, 40, device=device), torch.ones(1, device=device)
    drawn = sampling.posterior_sample(zero, zero, 0.5 * one, one, torch.tensor(3), 4) / (0.5 * 0.75**0.5)
    torch.testing.assert_close(drawn.cpu(), philox.normals(torch.Size((2, 40)), 3, 4, "posterior", torch.device("cpu")))


@pytest.mark.executes
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_guided_step_is_as_accurate_as_the_definition(shape, dtype, guided, device):
    x, denoised, uncond, grad = normals(shape, dtype, device, 4)
    following, sigma = levels(shape[0], dtype, device)
    (guidance,) = constants(shape[0], dtype, device, [shape[0]])
    call = (x, denoised, sigma, following, uncond if guided else None, 3 * guidance if guided else torch.ones_like(sigma))
    check(sampling, "guided_step", call)
    grad_change = torch.randn(shape[0], device=device, dtype=sigma.dtype)
    for grads in ((grad, grad_change), (grad, None), (None, grad_change)):
        check(sampling, "guided_step_backward", (*grads, *call, [True, True, guided]))


@pytest.mark.executes
def test_a_step_to_zero_is_the_denoised_sample(device):
    (x, denoised), one = normals((2, 9), torch.float32, device, 2), torch.ones(1, device=device)
    found, change = sampling.guided_step(x, denoised, one, 0 * one, None, one)
    assert_bitwise(found, denoised)
    torch.testing.assert_close(change, (denoised - x).abs().mean(1))


@pytest.mark.executes
def test_a_sample_does_not_depend_on_its_batch(device):
    (x, denoised), one = normals((2, _sums.CHUNK + 5), torch.float32, device, 2), torch.ones(1, device=device)
    whole = sampling.guided_step(x, denoised, one, 0.5 * one, None, one)
    assert_bitwise(sampling.guided_step(x[1:], denoised[1:], one, 0.5 * one, None, one), [o[1:] for o in whole])
    drawn = sampling.posterior_sample(denoised, x, 0.5 * one, one, torch.tensor(3), 0)
    assert_bitwise(sampling.posterior_sample(denoised[1:], x[1:], 0.5 * one, one, torch.tensor(3), 1), drawn[1:])


@pytest.mark.executes
@few_examples
@given(shape=shapes, permuted=st.booleans(), common=st.tuples(*[st.booleans()] * 3), seed=st.integers(-(2**63), 2**63 - 1))
def test_any_shape_layout_and_form_of_constants(shape, permuted, common, seed, device):
    x, denoised, uncond = (laid_out(t, permuted) for t in normals(shape, torch.float64, device, 3))
    share, sigma, guidance = constants(shape[0], torch.float64, device, [1 if one else shape[0] for one in common])
    lower = 0.5 * share * sigma.min() if sigma.numel() else share
    check(sampling, "guided_step", (x, denoised, sigma, lower, uncond, guidance))
    check(sampling, "posterior_sample", (denoised, x, lower, sigma, torch.tensor(seed), 2**33))


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_budgets(monkeypatch):
    one, grad, seed = torch.ones(1), torch.ones(2), torch.tensor(3)
    x = torch.zeros(2, 3 * _sums.CHUNK + 8, dtype=torch.bfloat16)
    check_budgets(
        "sampling",
        {
            "posterior_sample": lambda: sampling.posterior_sample(x, x, one, one, seed, 0),
            "posterior_sample_backward": lambda: sampling.posterior_sample_backward(x, x, x, one, one, seed, 0, [True, True]),
            "guided_step": lambda: sampling.guided_step(x, x, one, one, x, one),
            "guided_step_backward": lambda: sampling.guided_step_backward(x, grad, x, x, one, one, x, one, [True, True, True]),
        },
        monkeypatch,
    )
