"""Triton kernels of the score matching family against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff_kernels._companions import TABLE
from fastdiff_kernels.reference import philox
from fastdiff_kernels.reference import score_matching as definition
from fastdiff_kernels.triton import _sums, score_matching
from tests.helpers import FLOATS, assert_bitwise, assert_within_eager, outputs_of
from tests.triton.running import compile_launches, run_interpreted

# Every dtype once, every kind of shape once: the interpreter is slow.
CASES = [((2, 5, 6), dtype) for dtype in FLOATS] + [(shape, torch.bfloat16) for shape in ((1, _sums.CHUNK + 1), (4,), (0, 5))]
SEEDS = [(20241203, 0), (-(2**63) + 5, 2**33 + 1)]


def constants(batch, dtype, device):
    """sigma, gamma [B] and weight [1], in the dtype that the ops are given."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [(torch.rand(n, device=device) + 0.5).to(dtype) for n in (batch, batch, 1)]


def normals(shape, dtype, device, count=2):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]


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


def check(name, args, dtype):
    """The launcher's output is as near the float64 truth as the definition's in the same dtype."""
    found = outputs_of(getattr(score_matching, name)(*args))
    eager = outputs_of(TABLE[name].reference(*args))
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    truth = outputs_of(TABLE[name].reference(*wide))
    for f, e, t in zip(found, eager, truth, strict=True):
        assert f.shape == e.shape
        if t.numel() == 0:
            continue
        assert f.dtype == e.dtype
        if dtype == torch.float64:
            # Seeded normals are float32 values, equal to 2 ulp; stored ones are what they are.
            tolerance = 1e-6 if any(isinstance(a, torch.Tensor) and a.dtype == torch.int64 for a in args) else 1e-12
            torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)
        else:
            assert_within_eager(f, e, t)


@pytest.mark.executes
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward_is_as_accurate_as_the_definition(shape, dtype, device):
    sigma, gamma, weight = constants(shape[0], dtype, device)
    (x, z), seed = normals(shape, dtype, device), torch.tensor(7, device=device)
    check("lcss_perturb", (x, sigma, seed, 3), dtype)
    check("lcss_loss", (x, z, sigma, gamma, weight), dtype)
    check("lcss_loss_seeded", (x, seed, sigma, gamma, weight, 3), dtype)
    check("denoising_loss", (x, z, sigma), dtype)


@pytest.mark.executes
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_backward_is_as_accurate_as_the_definition(shape, dtype, device):
    sigma, gamma, weight = constants(shape[0], dtype, device)
    (x, z, grad_x), seed = normals(shape, dtype, device, 3), torch.tensor(7, device=device)
    grad = torch.randn_like(sigma)
    check("lcss_perturb_backward", (grad_x, x, sigma, seed, 3, [True]), dtype)
    check("lcss_loss_seeded_backward", (grad, x, seed, sigma, gamma, weight, 3, [True]), dtype)
    for needs in ([True, True], [True, False], [False, True]):
        check("lcss_loss_backward", (grad, x, z, sigma, gamma, weight, needs), dtype)
        check("denoising_loss_backward", (grad, x, z, sigma, needs), dtype)


@pytest.mark.executes
def test_a_sample_does_not_depend_on_its_batch_or_layout(device):
    (x, z), seed = normals((2, _sums.CHUNK + 5), torch.float32, device), torch.tensor(7)
    sigma, gamma, weight = constants(2, torch.float32, device)
    whole = score_matching.lcss_loss_seeded(x, seed, sigma, gamma, weight, 0)
    assert_bitwise(score_matching.lcss_loss_seeded(x[1:], seed, sigma[1:], gamma[1:], weight, 1), whole[1:])
    assert_bitwise(score_matching.lcss_loss_seeded(x.t().contiguous().t(), seed, sigma, gamma, weight, 0), whole)
    stored = score_matching.lcss_loss(x, z, sigma, gamma, weight)
    assert_bitwise(score_matching.lcss_loss(x[:1], z[:1], sigma[:1], gamma[:1], weight), stored[:1])


@pytest.mark.executes
def test_a_seed_stands_for_its_noise(device):
    (x,), seed = normals((2, 700), torch.float32, device, 1), torch.tensor(7)
    sigma, gamma, weight = constants(2, torch.float32, device)
    z = score_matching.lcss_noise(x, seed, 0)
    assert_bitwise(score_matching.lcss_loss_seeded(x, seed, sigma, gamma, weight, 0), score_matching.lcss_loss(x, z, sigma, gamma, weight))
    truth = definition.lcss_loss_stored(x.double(), z.double(), sigma.double(), gamma.double(), weight.double())
    torch.testing.assert_close(score_matching.lcss_loss_seeded(x, seed, sigma, gamma, weight, 0).double(), truth)


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_compiles_without_spills(monkeypatch):
    seed, one, grad = torch.tensor(7), torch.ones(1), torch.ones(2)
    x = torch.zeros(2, 3 * _sums.CHUNK + 8, dtype=torch.bfloat16)

    def calls():
        score_matching.lcss_perturb(x, one, seed, 2**40)
        score_matching.lcss_loss_seeded(x, seed, one, one, one, 0)
        score_matching.lcss_loss_backward(grad, x, x, one, one, one, [True, True])
        score_matching.lcss_loss_seeded_backward(grad, x, seed, one, one, one, 0, [True])
        score_matching.denoising_loss(x, x, one)
        score_matching.denoising_loss_backward(grad, x, x, one, [True, True])

    for binary in compile_launches(calls, monkeypatch):
        assert binary.stack == 0, binary
