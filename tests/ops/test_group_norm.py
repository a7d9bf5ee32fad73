"""Group normalisation with scale, shift and SiLU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastdiff_kernels import ops
from fastdiff_kernels.reference import group_norm as definition

from ..helpers import (
    assert_accurate,
    assert_bitwise,
    assert_independent_of_batch,
    assert_independent_of_threads,
    assert_within_eager,
    outputs_of,
)
from ..shapes import MAPS

NARROW = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def eager(x, groups, weight=None, bias=None, scale=None, shift=None, eps=1e-5, activation="silu"):
    if (weight is None) != (bias is None):  # F.group_norm's backward fails with one of them alone
        weight = torch.ones_like(bias) if weight is None else weight
        bias = torch.zeros_like(weight) if bias is None else bias
    y = F.group_norm(x, groups, weight, bias, eps)
    trailing = [1] * (x.dim() - 2)
    if scale is not None:
        y = y * (1 + scale.reshape(*scale.shape, *trailing))
    if shift is not None:
        y = y + shift.reshape(*shift.shape, *trailing)
    return F.silu(y) if activation else y


def defined(*args, **options):
    return definition.group_norm_silu(*args, **options)[0]


def operands(shape, requires_grad=True):
    batch, channels = shape[:2]
    shapes = (shape, (channels,), (channels,), (batch, channels), (batch, channels))
    return [torch.randn(s).requires_grad_(requires_grad) for s in shapes]


def with_groups(fn, groups, **options):
    """fn as a function of its tensors alone."""
    return lambda x, *parameters: fn(x, groups, *parameters, **options)


def gradients(fn, args):
    """Output and the gradients of its tensors for a fixed smooth upstream gradient."""
    leaves = [a.detach().requires_grad_() for a in args]
    outputs = outputs_of(fn(*leaves))
    return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, [torch.cos(o.detach()) for o in outputs]))


def last(x):
    return x.detach().contiguous(memory_format=CHANNELS_LAST[x.dim()])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 32, 9, 7), 8), ((3, 24, 40), 3), ((2, 64, 4, 4), 32), ((2, 6, 3, 5, 7), 1), ((4, 40), 4)]
)
def test_as_accurate_as_eager(shape, groups, dtype):
    assert_accurate(with_groups(ops.group_norm_silu, groups), with_groups(eager, groups), operands(shape), dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("channels", "groups"), MAPS.values(), ids=MAPS)
def test_maps_of_networks(channels, groups, dtype):
    args = operands((2, channels, 4, 3))
    # The largest of a few hundred errors depends on chance; their mean square is eager's.
    assert_accurate(with_groups(ops.group_norm_silu, groups), with_groups(eager, groups), args, dtype, factor=4.0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("shape", "groups"), [((2, 32, 9, 7), 8), ((2, 6, 3, 5, 7), 3)])
def test_as_accurate_as_eager_in_channels_last(shape, groups, dtype):
    def in_last(fn):
        return lambda x, *parameters: fn(x.contiguous(memory_format=CHANNELS_LAST[x.dim()]), groups, *parameters)

    assert_accurate(in_last(ops.group_norm_silu), in_last(eager), operands(shape), dtype)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    groups=st.integers(1, 5),
    width=st.integers(1, 9),
    positions=st.lists(st.integers(1, 9), max_size=3),
    present=st.lists(st.booleans(), min_size=4, max_size=4),
    activation=st.sampled_from(["silu", None]),
    channels_last=st.booleans(),
)
def test_any_shape_and_any_parameters(batch, groups, width, positions, present, activation, channels_last):
    x, *parameters = (a.detach().double() for a in operands((batch, groups * width, *positions)))
    if channels_last and x.dim() in CHANNELS_LAST:
        x = last(x)
    parameters = [p if p_present else None for p, p_present in zip(parameters, present, strict=True)]
    tensors = [x, *(p for p in parameters if p is not None)]

    def of_tensors(fn):
        def call(x, *given_):
            remaining = iter(given_)
            return fn(x, groups, *[None if p is None else next(remaining) for p in parameters], eps=1e-2, activation=activation)

        return call

    # F.group_norm wants more than one value a group in a batch; the definition has no such rule.
    expected = of_tensors(eager) if batch and x.numel() > batch * groups else of_tensors(defined)
    for a, e in zip(gradients(of_tensors(ops.group_norm_silu), tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", NARROW)
def test_chunks_of_one_projection_are_read_in_place(dtype):
    x, weight, bias, scale, shift = (a.to(dtype) for a in operands((3, 12, 5, 5), requires_grad=False))
    apart = torch.full_like(scale, float("nan"))
    projection = torch.cat([apart, scale, apart, shift], dim=1)
    _, strided_scale, _, strided_shift = projection.chunk(4, dim=1)
    op = with_groups(ops.group_norm_silu, 4)
    assert_bitwise(gradients(op, [x, weight, bias, strided_scale, strided_shift]), gradients(op, [x, weight, bias, scale, shift]))
    assert_bitwise(op(x, weight, bias, scale.T.contiguous().T, shift[:1].expand(3, 12)), op(x, weight, bias, scale, shift[:1].repeat(3, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_beside_a_16_bit_input(dtype):
    x, *parameters = operands((3, 12, 5, 5), requires_grad=False)
    x = x.to(dtype)
    result, *grads = gradients(with_groups(ops.group_norm_silu, 4), [x, *parameters])
    assert result.dtype == dtype
    assert [g.dtype for g in grads] == [dtype] + [torch.float32] * 4
    truth = eager(x.double(), 4, *[p.double() for p in parameters])
    assert_within_eager(result, truth.to(dtype), truth, factor=1.0)


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (2, 12, 3, 4, 5), (1, 12, 6, 6)])
def test_channels_last_stays_channels_last(shape):
    args = operands(shape, requires_grad=False)
    op = with_groups(ops.group_norm_silu, 4)
    plain, kept = gradients(op, args), gradients(op, [last(args[0]), *args[1:]])
    assert kept[0].is_contiguous(memory_format=CHANNELS_LAST[len(shape)])
    assert kept[1].is_contiguous(memory_format=CHANNELS_LAST[len(shape)])
    assert plain[0].is_contiguous()
    for a, e in zip(kept, plain, strict=True):
        torch.testing.assert_close(a, e)


def test_another_layout_comes_out_contiguous():
    args = operands((2, 12, 5, 7), requires_grad=False)
    turned = args[0].transpose(2, 3).contiguous().transpose(2, 3)
    op = with_groups(ops.group_norm_silu, 4)
    assert op(turned, *args[1:]).is_contiguous()
    assert_bitwise(gradients(op, [turned, *args[1:]]), gradients(op, args))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 24, 7, 7), (3, 24, 40, 33)])
def test_a_samples_result_does_not_depend_on_its_batch(shape, channels_last):
    x, weight, bias, scale, shift = operands(shape, requires_grad=False)
    x = last(x) if channels_last else x

    def op(x, scale, shift):
        return gradients(lambda *a: ops.group_norm_silu(a[0], 6, weight, bias, *a[1:]), [x, scale, shift])

    assert_independent_of_batch(op, x, scale, shift)


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_change_no_bit(channels_last):
    args = operands((3, 48, 40, 33), requires_grad=False)
    if channels_last:
        args[0] = last(args[0])
    assert_independent_of_threads(lambda: gradients(with_groups(ops.group_norm_silu, 6), args))


def test_gradients_that_nobody_asked_for_change_nothing():
    args = operands((2, 12, 5, 5), requires_grad=False)
    everything = gradients(with_groups(ops.group_norm_silu, 4), args)[1:]
    for i, whole in enumerate(everything):
        leaves = [a.detach().requires_grad_(i == j) for j, a in enumerate(args)]
        output = ops.group_norm_silu(leaves[0], 4, *leaves[1:])
        (alone,) = torch.autograd.grad(output, leaves[i], torch.cos(output.detach()))
        assert_bitwise(alone, whole)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_costs_no_digits(channels_last):
    x = torch.randn(2, 32, 24, 24) + 1024
    x = last(x) if channels_last else x
    assert_within_eager(ops.group_norm_silu(x, 4, None, None), eager(x, 4), eager(x.double(), 4))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_constant_group_is_its_shift(channels_last):
    x, shift = torch.full((2, 8, 5, 5), 7.25), torch.randn(2, 8)
    x = last(x) if channels_last else x
    result = ops.group_norm_silu(x, 2, None, None, None, shift, activation=None)
    assert_bitwise(result.contiguous(), shift[:, :, None, None].expand(2, 8, 5, 5).contiguous())


def test_one_group_a_channel_is_instance_norm_and_one_group_is_layer_norm():
    x = torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(ops.group_norm_silu(x, 8, None, None, activation=None), F.instance_norm(x))
    torch.testing.assert_close(ops.group_norm_silu(x, 1, None, None, activation=None), F.layer_norm(x, x.shape[1:]))


def test_permuting_positions_permutes_the_result():
    x, weight, bias, scale, shift = (a.double() for a in operands((2, 8, 30), requires_grad=False))
    order = torch.randperm(30)
    result = ops.group_norm_silu(x[:, :, order], 2, weight, bias, scale, shift)
    torch.testing.assert_close(result, ops.group_norm_silu(x, 2, weight, bias, scale, shift)[:, :, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(bad, channels_last):
    x = torch.randn(2, 8, 5, 5)
    x = last(x) if channels_last else x
    clean = ops.group_norm_silu(x, 4, None, None)
    x[1, 3, 2, 2] = bad
    result = ops.group_norm_silu(x, 4, None, None)
    assert result[1, 2:4].isnan().all()
    for index in ((0,), (1, slice(0, 2)), (1, slice(4, 8))):
        assert_bitwise(result[index], clean[index])


def test_silu_far_from_zero():
    shift = torch.tensor([[-1e4, -104.0, -88.5, 88.5, 104.0, 1e4]])
    result = ops.group_norm_silu(torch.zeros(1, 6, 1, 1), 1, None, None, None, shift).flatten()
    torch.testing.assert_close(result, F.silu(shift.double()).float().flatten(), rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (0, 8), (2, 8, 0, 5)])
def test_nothing_gives_zero_gradients_of_the_parameters(shape):
    args = operands(shape)
    result = ops.group_norm_silu(args[0], 2, *args[1:])
    assert result.shape == shape
    for grad, arg in zip(torch.autograd.grad(result.sum(), args), args, strict=True):
        assert_bitwise(grad, torch.zeros_like(arg))


def test_autocast_leaves_the_dtype():
    x = torch.randn(2, 8, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.group_norm_silu(x, 2, None, None).dtype == torch.float32
        assert ops.group_norm_silu(x.bfloat16(), 2, None, None).dtype == torch.bfloat16


X = torch.zeros(2, 6, 3, 3)
W = torch.zeros(6)
M = torch.zeros(2, 6)

REFUSED = {
    "x-type": (lambda: ops.group_norm_silu([1.0], 2, W, W), TypeError, "group_norm_silu: x must be a tensor; got list"),
    "x-dtype": (lambda: ops.group_norm_silu(X.int(), 2, W, W), TypeError, "x must be float32.*got torch.int32"),
    "x-dims": (lambda: ops.group_norm_silu(W, 2, W, W), ValueError, r"x must have at least 2 dimensions; got shape \(6,\)"),
    "groups-type": (lambda: ops.group_norm_silu(X, 2.0, W, W), TypeError, "num_groups must be an int; got float"),
    "groups-zero": (lambda: ops.group_norm_silu(X, 0, W, W), ValueError, "num_groups must be at least 1; got 0"),
    "groups": (lambda: ops.group_norm_silu(X, 4, W, W), ValueError, "num_groups must divide the channels of x, 6; got 4"),
    "no-channels": (lambda: ops.group_norm_silu(X[:, :0], 1, None, None), ValueError, "num_groups must divide the channels of x, 0; got 1"),
    "weight-shape": (lambda: ops.group_norm_silu(X, 2, M, W), ValueError, r"weight must have shape \(6,\).*got \(2, 6\)"),
    "bias-type": (lambda: ops.group_norm_silu(X, 2, W, 0.0), TypeError, "bias must be a tensor; got float"),
    "scale-shape": (lambda: ops.group_norm_silu(X, 2, W, W, W, M), ValueError, r"scale must have shape \(2, 6\).*got \(6,\)"),
    "shift-shape": (
        lambda: ops.group_norm_silu(X, 2, W, W, M, M[:, :3]),
        ValueError,
        r"shift must have shape \(2, 6\) for x of shape \(2, 6, 3, 3\); got \(2, 3\)",
    ),
    "shift-dtype": (
        lambda: ops.group_norm_silu(X.half(), 2, None, None, None, M.double()),
        TypeError,
        r"shift must be torch.float16 \(that of x\) or torch.float32; got torch.float64",
    ),
    "weight-narrower": (lambda: ops.group_norm_silu(X, 2, W.half(), W), TypeError, "weight must be torch.float32.*got torch.float16"),
    "device": (lambda: ops.group_norm_silu(X, 2, W.to("meta"), W), ValueError, "weight must be on the device of x, cpu; got meta"),
    "eps": (lambda: ops.group_norm_silu(X, 2, W, W, eps=0.0), ValueError, "eps must be finite and greater than 0; got 0"),
    "activation": (
        lambda: ops.group_norm_silu(X, 2, W, W, activation="gelu"),
        ValueError,
        "activation must be one of 'silu', None; got 'gelu'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
