"""Triton kernels of the skipping family against their definitions."""

from __future__ import annotations

import pytest
import torch

from fastdiff_kernels.reference import skipping as definition
from fastdiff_kernels.triton import _sums, skipping
from tests.helpers import FLOATS, assert_bitwise, assert_within_eager
from tests.triton.running import compile_launches, run_interpreted

SHAPES = [(2, 3), (3, 4, 5, 7), (1, _sums.CHUNK + 1), (2, 5 * _sums.CHUNK - 3), (4,), (0, 5)]


def latents(shape, dtype, device):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(4)]


@pytest.mark.executes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_difference_is_as_accurate_as_the_definition(shape, dtype, device):
    inputs = latents(shape, dtype, device)
    truths = definition.third_order_difference(*[x.double() for x in inputs])
    eagers = definition.third_order_difference(*inputs)
    for mean, eager, truth in zip(skipping.third_order_difference(*inputs), eagers, truths, strict=True):
        assert mean.dtype == eager.dtype
        if dtype == torch.float64:
            torch.testing.assert_close(mean, eager, rtol=1e-12, atol=0)
        else:
            assert_within_eager(mean, eager, truth)


@pytest.mark.executes
def test_difference_does_not_depend_on_the_batch_or_the_layout(device):
    inputs = latents((3, 2 * _sums.CHUNK + 5), torch.float32, device)
    whole = skipping.third_order_difference(*inputs)
    assert_bitwise(skipping.third_order_difference(*[x[1:2] for x in inputs]), [w[1:2] for w in whole])
    assert_bitwise(skipping.third_order_difference(*[x.t().contiguous().t() for x in inputs]), whole)


@pytest.mark.executes
def test_difference_of_samples_without_elements_is_nan(device):
    for mean in skipping.third_order_difference(*latents((2, 0), torch.float32, device)):
        assert mean.shape == (2,)
        assert mean.isnan().all()


@pytest.mark.executes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 1000), (0,)])
def test_skip_decides_as_the_definition(shape, dtype, device):
    changes = [torch.rand(shape, device=device).to(dtype) for _ in range(3)]
    threshold = torch.full((1,), 0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    decision = skipping.third_order_skip(*changes, threshold)
    assert_bitwise(decision, definition.third_order_skip(*changes, threshold))
    assert decision.shape == shape


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_compiles_without_spills(monkeypatch):
    short, long = torch.zeros(2, 64, dtype=torch.float64), torch.zeros(2, 3 * _sums.CHUNK, dtype=torch.bfloat16)
    changes, threshold = torch.zeros(64), torch.zeros(1)

    def calls():
        skipping.third_order_skip(changes, changes, changes, threshold)
        skipping.third_order_difference(*[short] * 4)
        skipping.third_order_difference(*[long] * 4)

    for binary in compile_launches(calls, monkeypatch):
        assert binary.stack == 0, binary
