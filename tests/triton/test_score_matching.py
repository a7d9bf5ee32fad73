"""Triton kernels of the score matching family against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_kernels.reference import philox
from fastdiff_kernels.reference import score_matching as definition
from fastdiff_kernels.triton import _sums, score_matching
from fastdiff_kernels.triton._scale import scale_samples_
from tests.helpers import FLOATS, assert_bitwise
from tests.triton.accuracy import check, constants, normals
from tests.triton.drawing import few_examples, laid_out, shapes
from tests.triton.running import check_budgets, run_interpreted

# Every dtype once, every kind of shape once: the interpreter is slow.
CASES = [((2, 5, 6), dtype) for dtype in FLOATS] + [(shape, torch.bfloat16) for shape in ((1, _sums.CHUNK + 1), (2,), (0, 5))]
SEEDS = [(20241203, 0), (-(2**63) + 5, 2**33 + 1)]


@pytest.mark.executes
@pytest.mark.parametrize(("seed", "offset"), SEEDS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 6001), (4,), (0, 5)])
def test_noise_equals_the_definition_to_two_ulp(shape, seed, offset, device):
    found = score_matching.lcss_noise(torch.empty(shape, device=device), torch.tensor(seed), offset).cpu()
    expected = philox.normals(torch.Size(shape), seed, offset, "lcss", torch.device("cpu"))
    spacing = torch.from_numpy(np.spacing(expected.abs().numpy()))
    assert ((found.double() - expected.double()).abs() <= 2 * spacing).all()


@pytest.mark.executes
@pytest.mark.parametrize("dtype", FLOATS)
def test_noise_does_not_depend_on_dtype_layout_or_batch(dtype, device):
    def draw(x, offset=0):
        return score_matching.lcss_noise(x.to(dtype), torch.tensor(5), offset)

    whole = draw(torch.empty(3, 4, 30, device=device))
    assert_bitwise(draw(torch.empty(3, 30, 4, device=device).mT), whole)
    assert_bitwise(draw(torch.empty(1, 120, device=device), offset=2), whole[2:].flatten(1))
    unrounded = score_matching.lcss_noise(torch.empty(3, 4, 30, device=device), torch.tensor(5), 0)
    # The interpreter cuts float32 off where it stores bfloat16.
    steps = 1 if dtype == torch.bfloat16 and device == "cpu" else 0
    torch.testing.assert_close(whole, unrounded.to(dtype), rtol=steps * 2**-7, atol=0)


@pytest.mark.executes
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward_is_as_accurate_as_the_definition(shape, dtype, device):
    sigma, gamma, weight = constants(shape[0], dtype, device)
    (x, z, m), seed = normals(shape, dtype, device, 3), torch.tensor(7, device=device)
    check(score_matching, "lcss_perturb", (x, sigma, seed, 3))
    check(score_matching, "denoising_loss", (x, z, sigma))
    check(score_matching, "lcss_loss", (x, z, None, sigma, gamma, weight))
    check(score_matching, "lcss_loss_seeded", (x, seed, m, sigma, gamma, weight, 3))


@pytest.mark.executes
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_gradients_are_as_accurate_as_the_definition(shape, dtype, device):
    """Those that forward writes, and those that backward does."""
    sigma, gamma, weight = constants(shape[0], dtype, device)
    (x, z, m, grad_x), seed = normals(shape, dtype, device, 4), torch.tensor(7, device=device)
    grad = torch.randn_like(sigma)
    check(score_matching, "lcss_perturb_backward", (grad_x, x, sigma, seed, 3, [True]))
    check(score_matching, "lcss_loss_seeded_backward", (grad, x, seed, m, sigma, gamma, weight, 3, [True, True]))
    check(score_matching, "lcss_loss_seeded_recorded", (x, seed, None, sigma, gamma, weight, 3, [True, False]))
    check(score_matching, "lcss_loss_backward", (grad, x, z, None, sigma, gamma, weight, [False, True, False]))
    check(score_matching, "lcss_loss_recorded", (x, z, m, sigma, gamma, weight, [True, True, True]))
    check(score_matching, "denoising_loss_backward", (grad, x, z, sigma, [True, True]))
    check(score_matching, "denoising_loss_recorded", (x, z, sigma, [False, True]))


@pytest.mark.executes
@pytest.mark.parametrize("dtype", FLOATS)
def test_scaling_touches_only_the_samples_that_need_it(dtype, device):
    (x,), (factor,) = normals((3, _sums.CHUNK + 3), dtype, device, 1), constants(3, dtype, device, [3])
    factor[1] = 1
    wide = factor.dtype
    expected = (factor[:, None] * x.to(wide)).to(dtype)
    scale_samples_(x, factor)
    # The interpreter cuts float32 off where it stores bfloat16.
    steps = 1 if dtype == torch.bfloat16 and device == "cpu" else 0
    torch.testing.assert_close(x, expected, rtol=steps * 2**-7, atol=0)


@pytest.mark.executes
def test_a_sample_does_not_depend_on_its_batch_or_layout(device):
    (x, z), seed = normals((2, _sums.CHUNK + 5), torch.float32, device, 2), torch.tensor(7)
    sigma, gamma, weight = constants(2, torch.float32, device)
    whole = score_matching.lcss_loss_seeded(x, seed, None, sigma, gamma, weight, 0)
    assert_bitwise(score_matching.lcss_loss_seeded(x[1:], seed, None, sigma[1:], gamma[1:], weight, 1), whole[1:])
    assert_bitwise(score_matching.lcss_loss_seeded(x.t().contiguous().t(), seed, None, sigma, gamma, weight, 0), whole)
    stored = score_matching.lcss_loss(x, z, None, sigma, gamma, weight)
    assert_bitwise(score_matching.lcss_loss(x[:1], z[:1], None, sigma[:1], gamma[:1], weight), stored[:1])


@pytest.mark.executes
def test_a_seed_stands_for_its_noise(device):
    (x,), seed = normals((2, 700), torch.float32, device, 1), torch.tensor(7)
    sigma, gamma, weight = constants(2, torch.float32, device)
    z = score_matching.lcss_noise(x, seed, 0)
    seeded = score_matching.lcss_loss_seeded(x, seed, None, sigma, gamma, weight, 0)
    assert_bitwise(seeded, score_matching.lcss_loss(x, z, None, sigma, gamma, weight))
    truth = definition.lcss_loss_stored(x.double(), z.double(), None, sigma.double(), gamma.double(), weight.double())
    torch.testing.assert_close(seeded.double(), truth)


@pytest.mark.executes
@few_examples
@given(shape=shapes, permuted=st.booleans(), common=st.tuples(*[st.booleans()] * 3), seed=st.integers(-(2**63), 2**63 - 1))
def test_any_shape_layout_and_form_of_constants(shape, permuted, common, seed, device):
    x, z, m = (laid_out(t, permuted) for t in normals(shape, torch.float64, device, 3))
    sigma, gamma, weight = constants(shape[0], torch.float64, device, [1 if one else shape[0] for one in common])
    stored, seeded = (x, z, m, sigma, gamma, weight), (x, torch.tensor(seed), None, sigma, gamma, weight, 3)
    check(score_matching, "lcss_loss", stored)
    check(score_matching, "lcss_loss_backward", (torch.randn(shape[0], device=device).double(), *stored, [True, True, True]))
    check(score_matching, "lcss_loss_seeded", seeded)
    check(score_matching, "denoising_loss", (x, z, weight))


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_budgets(monkeypatch):
    seed, one, grad = torch.tensor(7), torch.ones(1), torch.ones(2)
    x = torch.zeros(2, 3 * _sums.CHUNK + 8, dtype=torch.bfloat16)
    wide = x.float()
    three = [True, True, True]
    check_budgets(
        "score_matching",
        {
            "lcss_perturb": lambda: score_matching.lcss_perturb(x, one, seed, 2**40),
            "lcss_loss_recorded": lambda: score_matching.lcss_loss_recorded(wide, wide, None, one, one, one, three[:2] + [False]),
            "lcss_loss_seeded_recorded pair": lambda: score_matching.lcss_loss_seeded_recorded(x, seed, x, one, one, one, 0, [True, True]),
            "lcss_loss_seeded_backward": lambda: score_matching.lcss_loss_seeded_backward(grad, x, seed, x, one, one, one, 0, three[:2]),
            "denoising_loss_recorded": lambda: score_matching.denoising_loss_recorded(x, x, one, three[:2]),
            "scale_samples": lambda: scale_samples_(x, grad),
        },
        monkeypatch,
    )
