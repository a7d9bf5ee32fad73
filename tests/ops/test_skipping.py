"""The third-order criteria by which AdaptiveDiffusion skips network calls."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_kernels import backend, ops

from ..helpers import FLOATS, assert_accurate, assert_bitwise, assert_independent_of_batch, assert_independent_of_threads

# In float64 the eager composition is itself the truth: test_any_shape_and_layout compares there.
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# A chunk of the kernel has 16384 elements.
SHAPES = [(1, 1), (3, 5), (2, 4, 7, 3), (2, 16385), (1, 40000), (6,)]


def latents(*shape, dtype=torch.float32):
    """Four successive latents of a slow trajectory: the differences are far smaller than the values."""
    x = torch.randn(shape, dtype=torch.float64)
    return [(x + 0.05 * k * x.roll(1) + 0.01 * torch.randn(shape, dtype=torch.float64)).to(dtype) for k in range(4)]


def eager_difference(x0, x1, x2, x3):
    return (x3 - 3 * x2 + 3 * x1 - x0).abs().reshape(len(x0), -1).mean(1), (x3 - x2).abs().reshape(len(x0), -1).mean(1)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_difference_is_as_accurate_as_eager(shape, dtype):
    assert_accurate(ops.third_order_difference, eager_difference, latents(*shape, dtype=torch.float64), dtype)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=4), layout=st.sampled_from(["plain", "transposed", "strided", "expanded"]))
def test_difference_of_any_shape_and_layout(shape, layout):
    inputs = latents(*shape, dtype=torch.float64)
    if layout == "transposed":
        inputs = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    elif layout == "strided":
        inputs = [torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0] for x in inputs]
    elif layout == "expanded":
        inputs = [x[:1].expand(shape) for x in inputs]
    for mean, truth in zip(ops.third_order_difference(*inputs), eager_difference(*inputs), strict=True):
        torch.testing.assert_close(mean, truth, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_difference_has_one_mean_for_each_sample(dtype):
    third, last = ops.third_order_difference(*latents(3, 4, 2, dtype=dtype))
    assert third.shape == last.shape == (3,)
    assert third.dtype == last.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_difference_of_a_cubic_trajectory():
    """x_k = k^3 has third difference 6; a quadratic one has none."""
    cubic = [torch.full((2, 3), float(k**3)) for k in range(4)]
    third, last = ops.third_order_difference(*cubic)
    assert_bitwise((third, last), (torch.full((2,), 6.0), torch.full((2,), 19.0)))
    third, _ = ops.third_order_difference(*[torch.full((2, 3), float(k**2)) for k in range(4)])
    assert_bitwise(third, torch.zeros(2))


def test_difference_scales_with_the_latents_and_ignores_what_they_share():
    inputs = latents(3, 50, dtype=torch.float64)
    means = torch.stack(ops.third_order_difference(*inputs))
    torch.testing.assert_close(torch.stack(ops.third_order_difference(*[-4 * x for x in inputs])), 4 * means, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.stack(ops.third_order_difference(*[x + 3 for x in inputs])), means, rtol=1e-11, atol=0)


def test_difference_of_16_bit_latents_is_formed_in_float32():
    """Formed in bfloat16, the change of 1/128 beside 1 would be rounded; the mean over many elements would stall."""
    x = torch.ones(1, 100_000, dtype=torch.bfloat16)
    third, last = ops.third_order_difference(x, x, x, x + 2**-7)
    assert third.item() == last.item() == 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_difference_is_reproducible(dtype):
    inputs = latents(3, 50_001, dtype=dtype)
    assert_independent_of_batch(ops.third_order_difference, *inputs)
    assert_independent_of_threads(lambda: ops.third_order_difference(*inputs))


def test_difference_lets_nan_and_infinity_through():
    inputs = latents(3, 40)
    inputs[0][0, 7], inputs[3][1, 5] = torch.nan, torch.inf
    third, last = ops.third_order_difference(*inputs)
    assert third[0].isnan()
    assert last[0].isfinite()
    assert third[1] == last[1] == torch.inf
    assert third[2].isfinite()


def test_difference_of_nothing():
    for mean in ops.third_order_difference(*latents(0, 5)):
        assert mean.shape == (0,)
    for mean in ops.third_order_difference(*latents(2, 0)):
        assert mean.isnan().tolist() == [True, True]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7, 2), (40_000,), (0,)])
def test_skip_is_the_formula_in_the_compute_dtype(shape, dtype):
    d0, d1, d2 = (torch.rand(shape, dtype=torch.float64).to(dtype) for _ in range(3))
    skip = ops.third_order_skip(d0, d1, d2, 0.3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    d0, d1, d2 = (d.to(wide) for d in (d0, d1, d2))
    assert_bitwise(skip, ((d0 + d2) / 2 - d1).abs() <= 0.3 * d1)
    with backend("reference"):
        assert_bitwise(ops.third_order_skip(d0, d1, d2, 0.3), skip)


@pytest.mark.parametrize("threshold", [0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.float64)])
def test_skip_takes_the_threshold_in_every_form(threshold):
    d0, d1, d2 = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.5, 1.6])
    assert ops.third_order_skip(d0, d1, d2, threshold).tolist() == [True, False]
    assert ops.third_order_skip(d0[0], d1[0], d2[0], threshold).shape == ()


@pytest.mark.parametrize("threshold", [0.004, 0.01, 0.1])
def test_skip_of_geometric_changes(threshold):
    """d_k = r^k passes exactly for r between 1 + t -+ sqrt(2 t + t^2), t the threshold."""
    half_width = math.sqrt(2 * threshold + threshold**2)
    for edge, inside in ((1 + threshold - half_width, 1), (1 + threshold + half_width, -1)):
        ratios = torch.tensor([edge - 1e-9, edge + 1e-9], dtype=torch.float64)
        skip = ops.third_order_skip(ratios**0, ratios, ratios**2, threshold)
        assert skip.tolist() == [inside < 0, inside > 0]


def test_skip_of_linear_changes_needs_no_threshold():
    assert ops.third_order_skip(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0), 0.0).item() is True
    assert ops.third_order_skip(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.5), 0.0).item() is False


def test_skip_does_not_skip_on_nan():
    one, nan = torch.tensor(1.0), torch.tensor(torch.nan)
    for changes in ((nan, one, one), (one, nan, one), (one, one, nan)):
        assert ops.third_order_skip(*changes, 0.5).item() is False


def test_skip_takes_any_layout_and_any_number_of_threads():
    changes = [torch.rand(300, 400).t() for _ in range(3)]
    assert_bitwise(ops.third_order_skip(*changes, 0.2), ops.third_order_skip(*[d.contiguous() for d in changes], 0.2))
    assert_independent_of_threads(lambda: ops.third_order_skip(*changes, 0.2))


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((1.0, ONES, ONES, 0.1), TypeError, "d0 must be a tensor; got float"),
        ((ONES, torch.ones(3), ONES, 0.1), ValueError, r"d1 must have the shape of d0, \(2,\); got \(3,\)"),
        ((ONES, ONES, ONES.double(), 0.1), TypeError, "d2 must have the dtype of d0"),
        ((torch.ones(2, dtype=torch.int32),) * 3 + (0.1,), TypeError, "d0 must be float32, bfloat16, float16 or float64; got torch.int32"),
        ((ONES,) * 3 + (-0.1,), ValueError, "threshold must be finite and at least 0; got -0.1"),
        ((ONES,) * 3 + (math.nan,), ValueError, "threshold must be finite and at least 0; got nan"),
        ((ONES,) * 3 + (torch.tensor(math.inf),), ValueError, "threshold must be finite and at least 0; got inf"),
        ((ONES,) * 3 + ("0.1",), TypeError, "threshold must be a float or a tensor; got str"),
        ((ONES,) * 3 + (True,), TypeError, "threshold must be a float or a tensor; got bool"),
        ((ONES,) * 3 + (ONES,), ValueError, r"threshold must be .* 0-d or of shape \(1,\); got shape \(2,\)"),
        ((ONES,) * 3 + (torch.ones(1, dtype=torch.int64),), TypeError, "threshold must be float32 or float64; got torch.int64"),
    ],
)
def test_skip_errors_name_the_argument(arguments, error, text):
    with pytest.raises(error, match=f"third_order_skip: {text}"):
        ops.third_order_skip(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.ones(()),) * 4, ValueError, r"x0 must have at least 1 dimension; got shape \(\)"),
        ((ONES, ONES, ONES, torch.ones(2, 1)), ValueError, r"x3 must have the shape of x0, \(2,\); got \(2, 1\)"),
        ((ONES, ONES.half(), ONES, ONES), TypeError, "x1 must have the dtype of x0, torch.float32"),
        ((ONES, ONES, None, ONES), TypeError, "x2 must be a tensor; got NoneType"),
        ((ONES, ONES, torch.ones(2, device="meta"), ONES), ValueError, "x2 must be on the device of x0, cpu; got meta"),
    ],
)
def test_difference_errors_name_the_argument(arguments, error, text):
    with pytest.raises(error, match=f"third_order_difference: {text}"):
        ops.third_order_difference(*arguments)


def test_gradients_are_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="third_order_difference: x1 must not require grad"):
        ops.third_order_difference(x, x.clone().requires_grad_(), x, x)
    with pytest.raises(ValueError, match="third_order_skip: d2 must not require grad"):
        ops.third_order_skip(x, x, x.clone().requires_grad_(), 0.1)
    with pytest.raises(ValueError, match="third_order_skip: threshold must not require grad"):
        ops.third_order_skip(x, x, x, torch.tensor(0.1, requires_grad=True))


def test_compiles_into_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def decide(x0, x1, x2, x3, threshold):
        third, last = ops.third_order_difference(x0, x1, x2, x3)
        return ops.third_order_skip(third, last, third, threshold), third

    inputs = latents(3, 20)
    third, last = ops.third_order_difference(*inputs)
    assert_bitwise(decide(*inputs, torch.tensor(0.5)), (ops.third_order_skip(third, last, third, 0.5), third))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (2, 0)])
def test_gpu_kernels_agree_with_the_definition(shape, dtype, name):
    inputs = [x.cuda() for x in latents(*shape, dtype=dtype)]
    threshold = torch.tensor(0.3, device="cuda")
    with backend("reference"):
        expected = ops.third_order_difference(*[x.double() for x in inputs])
        decision = ops.third_order_skip(*inputs[:3], threshold)
    with backend(name):
        means = ops.third_order_difference(*inputs)
        assert_bitwise(ops.third_order_skip(*inputs[:3], threshold), decision)
    for mean, truth in zip(means, expected, strict=True):
        rounding = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(mean.double(), truth, rtol=rounding, atol=0, equal_nan=True)
