"""Query and key normalisation with rotary embedding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastdiff_kernels import ops
from fastdiff_kernels.reference import rotary as definition

from ..helpers import (
    FLOATS,
    assert_accurate,
    assert_bitwise,
    assert_independent_of_batch,
    assert_independent_of_threads,
    assert_within_eager,
)
from ..shapes import HEADS

NARROW = (torch.float32, torch.bfloat16, torch.float16)
NORMS = ("rms", "layer", "rms_heads", "layer_heads", "pixel", None)
ROPES = ("interleaved", "half")
EPS = 1e-6


def eager_norm(x, weight, norm):
    if norm is None:
        return x
    if norm == "pixel":
        return x / (EPS + x.square().mean(-1, keepdim=True).sqrt())
    rows = x.flatten(2) if norm.endswith("_heads") else x
    if norm.startswith("rms"):
        rows = F.rms_norm(rows, rows.shape[-1:], weight, EPS)
    else:
        rows = F.layer_norm(rows, rows.shape[-1:], weight, eps=EPS)
    return rows.reshape(x.shape)


def eager_rope(x, cos, sin, rope):
    """As a complex product ("interleaved") or with the two halves exchanged ("half"), both common in models."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # over the heads
    if rope == "half":
        swapped = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
        return x * torch.cat([cos, cos], -1) + swapped * torch.cat([sin, sin], -1)
    swapped = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    return x * cos.repeat_interleave(2, -1) + swapped * sin.repeat_interleave(2, -1)


def eager(norm, rope):
    def of_tensors(q, k, q_weight=None, k_weight=None, cos=None, sin=None):
        q, k = eager_norm(q, q_weight, norm), eager_norm(k, k_weight, norm)
        return (q, k) if cos is None else (eager_rope(q, cos, sin, rope), eager_rope(k, cos, sin, rope))

    return of_tensors


def ours(norm, rope):
    return lambda *tensors: ops.qk_norm_rope(*tensors, norm=norm, rope=rope, eps=EPS)


def angles(*shape):
    angle = 3 * torch.randn(shape)
    return angle.cos(), angle.sin()


def operands(norm, batch, rows, heads, width, batched_angles=False, requires_grad=False):
    """q, k, their weights where the norm has them, and cos and sin."""
    size = heads * width if norm and norm.endswith("_heads") else width
    weights = [torch.randn(size) for _ in range(2)] if norm in NORMS[:4] else [None, None]
    differentiable = [torch.randn(batch, rows, heads, width), torch.randn(batch, rows, heads, width), *weights]
    lead = (batch, rows) if batched_angles else (rows,)
    return [t if t is None else t.requires_grad_(requires_grad) for t in differentiable] + list(angles(*lead, width // 2))


def gradients(fn, args):
    """Outputs, and the gradients of q, k and the weights for a fixed smooth upstream gradient."""
    leaves = [a.detach().requires_grad_() if a is not None and i < 4 else a for i, a in enumerate(args)]
    outputs = fn(*leaves)
    wanted = [a for a in leaves[:4] if a is not None]
    return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, [torch.cos(o.detach()) for o in outputs]))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("norm", NORMS)
def test_as_accurate_as_eager(norm, rope, dtype):
    assert_accurate(ours(norm, rope), eager(norm, rope), operands(norm, 2, 19, 3, 72, requires_grad=True), dtype)


@settings(max_examples=80, deadline=None)
@given(
    norm=st.sampled_from(NORMS),
    rope=st.sampled_from(ROPES),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(1, 4), st.integers(2, 20).map(lambda half: 2 * half)),
    batched=st.booleans(),
)
def test_any_shape(norm, rope, shape, batched):
    args = [None if a is None else a.double() for a in operands(norm, *shape, batched_angles=batched)]
    for a, e in zip(gradients(ours(norm, rope), args), gradients(eager(norm, rope), args), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("heads", "width"), HEADS.values(), ids=HEADS)
def test_heads_of_networks(heads, width, rope):
    for i, norm in enumerate(NORMS, ROPES.index(rope)):
        args = operands(norm, 2, 3, heads, width, batched_angles=i % 2 == 0, requires_grad=True)
        # The largest of a few thousand errors depends on chance; their mean square is eager's within a fifth.
        assert_accurate(ours(norm, rope), eager(norm, rope), args, NARROW[i % 3], factor=4.0)


@pytest.mark.parametrize("norm", NORMS)
def test_without_rotation_keys_may_have_other_lengths_and_width_may_be_odd(norm):
    q, k, q_weight, k_weight, _, _ = operands(norm, 2, 9, 3, 7)
    k = k[:, :4]
    for a, e in zip(ours(norm, "half")(q, k, q_weight, k_weight), eager(norm, "half")(q, k, q_weight, k_weight), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", NORMS)
def test_parts_of_one_projection_are_read_in_place(norm, dtype):
    args = [None if a is None else a.to(dtype) for a in operands(norm, 2, 9, 3, 24)]
    packed = torch.stack([args[0], args[1], torch.full_like(args[0], float("nan"))], 2)  # [B, N, 3, H, D]
    strided = [packed[:, :, 0], packed[:, :, 1], *args[2:]]
    assert_bitwise(gradients(ours(norm, "interleaved"), strided), gradients(ours(norm, "interleaved"), args))
    turned = [a.transpose(1, 3).contiguous().transpose(1, 3) for a in args[:2]]
    assert_bitwise(ours(norm, "half")(*turned, *args[2:]), ours(norm, "half")(*args))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("tokens", "width"), [(9, 24), (70, 40), (33, 7)])
def test_tokens_may_be_innermost(tokens, width, norm, dtype):
    """As in a projection by a convolution, [B, H, D, 3, N]."""
    args = [None if a is None else a.to(dtype) for a in operands(norm, 2, tokens, 3, width)]
    if width % 2:
        args[4:] = [None, None]
    packed = torch.stack([args[0], args[1], torch.full_like(args[0], float("nan"))], 3).permute(0, 2, 4, 3, 1).contiguous()
    inside = [packed[..., i, :].permute(0, 3, 1, 2) for i in range(2)]
    found, expected = (gradients(ours(norm, "half"), [*qk, *args[2:]]) for qk in (inside, args[:2]))
    assert_bitwise(found[:4], expected[:4])
    # The gradients of weights are added in another order: head by head.
    for f, e in zip(found[4:], expected[4:], strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["rms", "layer_heads"])
def test_float32_weights_and_angles_beside_16_bit_input(norm, dtype):
    args = operands(norm, 2, 9, 3, 24)
    args = [a.to(dtype) for a in args[:2]] + args[2:]
    results = gradients(ours(norm, "interleaved"), args)
    assert [r.dtype for r in results] == [dtype] * 4 + [torch.float32] * 2
    truth = eager(norm, "interleaved")(*[a.double() for a in args])
    for result, exact in zip(results[:2], truth, strict=True):
        assert_within_eager(result, exact.to(dtype), exact, factor=1.0)


@pytest.mark.parametrize("norm", ["rms", "layer_heads"])
def test_gradients_of_the_angles_are_those_of_the_definition(norm):
    args = [a.double() for a in operands(norm, 2, 5, 2, 8)]
    args[4:] = [a.requires_grad_() for a in args[4:]]
    found = torch.autograd.grad(sum(o.sin().sum() for o in ours(norm, "half")(*args)), args[4:])
    expected = torch.autograd.grad(sum(o.sin().sum() for o in definition.qk_norm_rope(*args, norm, "half", EPS)), args[4:])
    assert_bitwise(found, expected)
    assert all(g.abs().max() > 0 for g in found)


@pytest.mark.parametrize("norm", NORMS)
def test_a_samples_result_does_not_depend_on_its_batch(norm):
    q, k, q_weight, k_weight, cos, sin = operands(norm, 3, 70, 2, 24)

    def outputs_and_input_gradients(q, k):
        return gradients(ours(norm, "interleaved"), [q, k, q_weight, k_weight, cos, sin])[:4]

    assert_independent_of_batch(outputs_and_input_gradients, q, k)


@pytest.mark.parametrize("norm", NORMS)
def test_threads_change_no_bit(norm):
    args = operands(norm, 3, 300, 4, 24)
    assert_independent_of_threads(lambda: gradients(ours(norm, "half"), args))


@pytest.mark.parametrize("asked", range(4))
def test_gradients_that_nobody_asked_for_change_nothing(asked):
    args = operands("layer", 2, 70, 2, 24)
    everything = gradients(ours("layer", "half"), args)[2:]
    leaves = [a.detach().requires_grad_(i == asked) for i, a in enumerate(args)]
    outputs = ours("layer", "half")(*leaves)
    (alone,) = torch.autograd.grad(outputs[asked % 2], leaves[asked], torch.cos(outputs[asked % 2].detach()))
    assert_bitwise(alone, everything[asked])


@pytest.mark.parametrize("rope", ROPES)
def test_rotation_by_positions_makes_inner_products_depend_on_distance_alone(rope):
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 30, 2, 8)
    frequencies = torch.arange(30, dtype=torch.float64)[:, None] * 0.5 ** torch.arange(4)
    q, k = ops.qk_norm_rope(q, k, cos=frequencies.cos(), sin=frequencies.sin(), norm=None, rope=rope)
    products = torch.einsum("bnhd,bmhd->bhnm", q, k)[0, 0]
    for distance in (-3, 0, 7):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("rope", ROPES)
def test_rotation_preserves_inner_products_and_turns_back(rope):
    q, k, angle = torch.randn(2, 9, 2, 16).double(), torch.randn(2, 9, 2, 16).double(), torch.randn(9, 8).double()
    cos, sin = angle.cos(), angle.sin()
    turned = ops.qk_norm_rope(q, k, cos=cos, sin=sin, norm=None, rope=rope)
    torch.testing.assert_close((turned[0] * turned[1]).sum(-1), (q * k).sum(-1))
    for back, original in zip(ops.qk_norm_rope(*turned, cos=cos, sin=-sin, norm=None, rope=rope), (q, k), strict=True):
        torch.testing.assert_close(back, original)


def test_no_rotation_at_angle_zero():
    q, k, *_ = operands(None, 2, 9, 2, 16)
    zero = torch.zeros(9, 8)
    assert_bitwise(ops.qk_norm_rope(q, k, cos=zero.cos(), sin=zero.sin(), norm=None), (q, k))


@pytest.mark.parametrize("norm", ["rms", "layer", "rms_heads", "layer_heads"])
def test_scaling_the_input_leaves_the_norm(norm):
    args = operands(norm, 2, 9, 2, 16)
    scaled = [4 * a for a in args[:2]] + args[2:]
    assert_bitwise(ops.qk_norm_rope(*scaled, norm=norm, eps=16e-5), ops.qk_norm_rope(*args, norm=norm, eps=1e-5))


@pytest.mark.parametrize("norm", ["rms", "layer", "pixel"])
def test_a_zero_head_has_a_finite_gradient(norm):
    x = torch.zeros(1, 1, 1, 8, requires_grad=True)
    outputs = ops.qk_norm_rope(x, x.detach(), norm=norm, eps=1e-2)
    (grad,) = torch.autograd.grad(outputs[0], x, torch.ones_like(x))
    expected = {"rms": 10.0, "layer": 0.0, "pixel": 100.0}[norm]
    torch.testing.assert_close(grad, torch.full_like(x, expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_head(bad):
    args = operands("rms", 2, 9, 3, 16)
    clean = ops.qk_norm_rope(*args)[0]
    args[0][1, 4, 2, 3] = bad
    result = ops.qk_norm_rope(*args)[0]
    assert result[1, 4, 2].isnan().any()
    result[1, 4, 2] = clean[1, 4, 2]
    assert_bitwise(result, clean)


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
def test_nothing_gives_zero_gradients_of_the_weights(shape):
    args = operands("layer_heads", *shape, 2, 8, requires_grad=True)
    outputs = ops.qk_norm_rope(*args, norm="layer_heads")
    for grad, arg in zip(torch.autograd.grad([o.sum() for o in outputs], args[:4]), args[:4], strict=True):
        assert_bitwise(grad, torch.zeros_like(arg))


def eager_pixel_norm(*qkv):
    return tuple(eager_norm(x, None, "pixel") for x in qkv)


def pixel_norm(*qkv):
    return ops.qkv_pixel_norm(*qkv, eps=EPS)


def each_pixel_norm(*qkv):
    return tuple(ops.pixel_norm(x, eps=EPS) for x in qkv)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(2, 9, 3, 72), (1, 70, 1, 256), (3, 5, 2, 7), (0, 4, 2, 8), (2, 0, 2, 8)])
def test_pixel_norm_is_as_accurate_as_eager(shape, dtype):
    qkv = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    assert_accurate(pixel_norm, eager_pixel_norm, qkv, dtype)
    assert_accurate(each_pixel_norm, eager_pixel_norm, qkv, dtype)
    shorter = [qkv[0], *(x.detach()[:, :3].requires_grad_() for x in qkv[1:])]
    assert_accurate(pixel_norm, eager_pixel_norm, shorter, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", [pixel_norm, each_pixel_norm])
def test_pixel_norm_reads_projections_in_place(op, dtype):
    qkv = torch.randn(3, 2, 70, 3, 40).to(dtype)

    def results(parts):
        leaves = [p.detach().requires_grad_() for p in parts]
        outputs = op(*leaves)
        return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, [torch.cos(o.detach()) for o in outputs]))

    expected = results(qkv)
    assert all(e.is_contiguous() for e in expected)
    packed = qkv.permute(1, 2, 0, 3, 4).contiguous()  # [B, N, 3, H, D]
    tokens_inside = qkv.permute(1, 3, 4, 0, 2).contiguous()  # [B, H, D, 3, N]
    assert_bitwise(results(packed.unbind(2)), expected)
    assert_bitwise(results([x.permute(0, 3, 1, 2) for x in tokens_inside.unbind(3)]), expected)
    assert_independent_of_threads(lambda: results(packed.unbind(2)))
    assert_independent_of_batch(lambda *parts: results(parts), *qkv)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_projection_is_normalised_at_once(dtype):
    packed = torch.randn(2, 70, 3, 2, 40).to(dtype).requires_grad_()
    upstream = torch.randn(2, 70, 3, 2, 40).to(dtype)

    def results(outputs):
        return outputs.detach(), torch.autograd.grad(outputs, packed, upstream)[0]

    at_once = ops.pixel_norm(packed.flatten(2, 3), eps=EPS).view_as(packed)
    assert_bitwise(results(at_once), results(torch.stack(pixel_norm(*packed.unbind(2)), 2)))


def test_pixel_norm_gives_heads_of_mean_square_one():
    for x in ops.qkv_pixel_norm(*torch.randn(3, 2, 9, 3, 64).double(), eps=1e-12):
        torch.testing.assert_close(x.square().mean(-1), torch.ones(2, 9, 3).double())


def test_pixel_norm_of_zeros_has_a_slope():
    zeros = [torch.zeros(1, 1, 1, 8, requires_grad=True) for _ in range(3)]
    for grad in torch.autograd.grad([o.sum() for o in ops.qkv_pixel_norm(*zeros, eps=1e-2)], zeros):
        torch.testing.assert_close(grad, torch.full_like(grad, 100.0))


Q = torch.zeros(2, 3, 2, 4)
W = torch.zeros(4)
A = torch.zeros(3, 2)

REFUSED = {
    "q-type": (lambda: ops.qk_norm_rope(None, Q), TypeError, "qk_norm_rope: q must be a tensor; got NoneType"),
    "k-dtype": (lambda: ops.qk_norm_rope(Q, Q.half()), TypeError, "k must have the dtype of q, torch.float32; got torch.float16"),
    "q-dims": (lambda: ops.qk_norm_rope(Q[0], Q), ValueError, r"q must have 4 dimensions; got shape \(3, 2, 4\)"),
    "no-heads": (lambda: ops.qk_norm_rope(Q[:, :, :0], Q[:, :, :0]), ValueError, "q must have at least one head and one channel a head"),
    "k-heads": (
        lambda: ops.qk_norm_rope(Q, Q[:, :, :1]),
        ValueError,
        r"k must have the batch, heads and head dimension of q.*got \(2, 3, 1, 4\)",
    ),
    "norm": (lambda: ops.qk_norm_rope(Q, Q, norm="batch"), ValueError, "norm must be one of 'rms', 'layer'.*got 'batch'"),
    "rope": (lambda: ops.qk_norm_rope(Q, Q, rope="neox"), ValueError, "rope must be one of 'interleaved', 'half'; got 'neox'"),
    "weight-shape": (
        lambda: ops.qk_norm_rope(Q, Q, torch.zeros(8)),
        ValueError,
        r"q_weight must have shape \(4,\) for norm='rms'.*got \(8,\)",
    ),
    "weight-heads": (
        lambda: ops.qk_norm_rope(Q, Q, None, W, norm="layer_heads"),
        ValueError,
        r"k_weight must have shape \(8,\) for norm='layer_heads'.*got \(4,\)",
    ),
    "weight-dtype": (lambda: ops.qk_norm_rope(Q, Q, W.double()), TypeError, "q_weight must be torch.float32.*got torch.float64"),
    "weight-pixel": (lambda: ops.qk_norm_rope(Q, Q, W, norm="pixel"), ValueError, "q_weight must be None for norm='pixel'"),
    "weight-none": (lambda: ops.qk_norm_rope(Q, Q, None, W, norm=None), ValueError, "k_weight must be None for norm=None"),
    "cos-alone": (lambda: ops.qk_norm_rope(Q, Q, cos=A), ValueError, "sin must be given beside cos"),
    "sin-alone": (lambda: ops.qk_norm_rope(Q, Q, sin=A), ValueError, "cos must be given beside sin"),
    "cos-shape": (
        lambda: ops.qk_norm_rope(Q, Q, cos=A[:2], sin=A),
        ValueError,
        r"cos must have shape \(3, 2\) or \(2, 3, 2\); got \(2, 2\)",
    ),
    "sin-differs": (lambda: ops.qk_norm_rope(Q, Q, cos=A, sin=A.expand(2, 3, 2)), ValueError, "sin must have the shape and dtype of cos"),
    "cos-dtype": (lambda: ops.qk_norm_rope(Q, Q, cos=A.half(), sin=A), TypeError, "cos must be torch.float32.*got torch.float16"),
    "odd": (
        lambda: ops.qk_norm_rope(Q[..., :3], Q[..., :3], cos=A[:, :1], sin=A[:, :1]),
        ValueError,
        "q must have an even head dimension to be rotated",
    ),
    "rows": (lambda: ops.qk_norm_rope(Q, Q[:, :2], cos=A, sin=A), ValueError, "k must have as many rows as q, 3, to be rotated"),
    "device": (lambda: ops.qk_norm_rope(Q, Q.to("meta")), ValueError, "k must be on the device of q, cpu; got meta"),
    "pixel-k": (
        lambda: ops.qkv_pixel_norm(Q, Q[:1], Q),
        ValueError,
        r"qkv_pixel_norm: k must have the batch, heads and head dimension of q.*got \(1, 3, 2, 4\)",
    ),
    "pixel-v": (lambda: ops.qkv_pixel_norm(Q, Q, Q[:, :2]), ValueError, r"v must have the shape of k, .*got \(2, 2, 2, 4\)"),
    "pixel-v-dtype": (
        lambda: ops.qkv_pixel_norm(Q, Q, Q.half()),
        TypeError,
        "v must have the dtype of k, torch.float32; got torch.float16",
    ),
    "pixel-one-dims": (lambda: ops.pixel_norm(Q[0]), ValueError, "pixel_norm: x must have 4 dimensions"),
    "pixel-one-empty": (
        lambda: ops.pixel_norm(Q[:, :, :0]),
        ValueError,
        "pixel_norm: x must have at least one head and one channel a head",
    ),
    "pixel-one-eps": (lambda: ops.pixel_norm(Q, eps=-1), ValueError, "pixel_norm: eps must be finite and greater than 0; got -1"),
    "pixel-eps": (lambda: ops.qkv_pixel_norm(Q, Q, Q, eps=0), ValueError, "eps must be finite and greater than 0; got 0"),
    "eps": (lambda: ops.qk_norm_rope(Q, Q, eps=-1.0), ValueError, "eps must be finite and greater than 0; got -1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
