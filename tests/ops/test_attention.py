"""Softmax attention with keys that may end early."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_kernels import ops
from fastdiff_kernels.reference import attention as definition

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


def eager(q, k, v, scale=None):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v).transpose(1, 2)


def operands(batch, rows, keys, heads, width, requires_grad=False):
    return [torch.randn(batch, n, heads, width).requires_grad_(requires_grad) for n in (rows, keys, keys)]


def gradients(fn, args):
    """Output and the gradients of its tensors for a fixed smooth upstream gradient."""
    leaves = [a.detach().requires_grad_() for a in args]
    output = fn(*leaves)
    return (output.detach(), *torch.autograd.grad(output, leaves, torch.cos(output.detach())))


def as_lengths(*lengths):
    return torch.tensor(lengths)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("rows", "keys", "width"), [(64, 64, 16), (70, 33, 72), (5, 300, 5), (1, 1, 1), (130, 257, 256)])
def test_as_accurate_as_eager(rows, keys, width, dtype):
    # Probabilities made again from the stored log-sum-exp have its rounding, as those that eager stores have not.
    assert_accurate(ops.attention, eager, operands(2, rows, keys, 2, width, requires_grad=True), dtype, factor=4.0)
    assert_accurate(ops.attention, eager, operands(2, rows, keys, 2, width), dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(("heads", "width"), HEADS.values(), ids=HEADS)
def test_heads_of_networks(heads, width, dtype):
    assert_accurate(ops.attention, eager, operands(1, 37, 41, heads, width, requires_grad=True), dtype, factor=4.0)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    rows=st.integers(0, 80),
    keys=st.integers(0, 80),
    heads=st.integers(1, 3),
    width=st.integers(1, 40),
    scale=st.sampled_from([None, 0.0, -0.7, 1.3]),
    data=st.data(),
)
def test_any_shape_and_any_lengths(batch, rows, keys, heads, width, scale, data):
    lengths = data.draw(st.none() | st.lists(st.integers(-2, keys + 3), min_size=batch, max_size=batch))
    args = [a.double() for a in operands(batch, rows, keys, heads, width)]
    key_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
    ours = gradients(lambda *a: ops.attention(*a, scale=scale, key_lengths=key_lengths), args)
    expected = gradients(lambda *a: definition.attention(*a, scale, key_lengths)[0], args)
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", FLOATS)
def test_parts_of_one_projection_are_read_in_place(dtype):
    packed = torch.randn(2, 37, 3, 2, 24).to(dtype)
    strided = packed.unbind(2)
    assert_bitwise(gradients(ops.attention, strided), gradients(ops.attention, [t.contiguous() for t in strided]))
    turned = [t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for t in strided]
    assert_bitwise(ops.attention(*turned), ops.attention(*strided))
    assert ops.attention(*turned).is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_padding_never_leaks(poison, dtype):
    q, k, v = (t.to(dtype) for t in operands(4, 20, 70, 2, 16))
    lengths = as_lengths(70, 33, 1, 0)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = poison, poison
    output, grad_q, grad_k, grad_v = gradients(lambda *a: ops.attention(*a, key_lengths=lengths), [q, k, v])
    for b, length in enumerate(lengths.tolist()):
        if length == 0:
            assert_bitwise(output[b], torch.zeros_like(output[b]))
            assert_bitwise(grad_q[b], torch.zeros_like(grad_q[b]))
        else:
            alone = gradients(ops.attention, [q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length]])
            for a, e in zip((output[b], grad_q[b], grad_k[b, :length], grad_v[b, :length]), alone, strict=True):
                torch.testing.assert_close(a, e[0])
        for grad in (grad_k, grad_v):
            assert_bitwise(grad[b, length:], torch.zeros_like(grad[b, length:]))


def test_lengths_are_clamped():
    args = operands(3, 5, 8, 2, 4)
    clamped = ops.attention(*args, key_lengths=as_lengths(0, 8, 8))
    assert_bitwise(ops.attention(*args, key_lengths=as_lengths(-5, 8, 1000)), clamped)
    assert_bitwise(ops.attention(*args, key_lengths=as_lengths(-5, 8, 1000).int()), clamped)
    assert_bitwise(ops.attention(*args, key_lengths=torch.stack([as_lengths(0, 8, 8)] * 2, 1)[:, 0]), clamped)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "heads", "width"), [(64, 1, 32), (37, 2, 24), (300, 1, 5)])
def test_one_projection_is_its_parts(rows, heads, width, dtype):
    qkv, lengths = torch.randn(2, rows, 3, heads, width).to(dtype), as_lengths(rows, rows // 2)
    for key_lengths in (None, lengths):
        packed = gradients(lambda x, n=key_lengths: ops.attention_packed(x, scale=0.3, key_lengths=n), [qkv])
        parts = gradients(lambda *x, n=key_lengths: ops.attention(*x, scale=0.3, key_lengths=n), qkv.unbind(2))
        assert_bitwise(packed, (parts[0], torch.stack(parts[1:], 2)))
        assert packed[1].is_contiguous()
    turned = qkv.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert_bitwise(gradients(ops.attention_packed, [turned]), gradients(ops.attention_packed, [qkv]))


def test_the_gradient_of_a_projection_writes_nothing_twice():
    qkv = torch.randn(2, 64, 3, 1, 32, requires_grad=True)
    output = ops.attention_packed(qkv)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(output, qkv, torch.ones_like(output))
    names = {event.key for event in profile.key_averages()}
    assert "fastdiff::attention_packed_backward" in names
    assert not names & {"aten::cat", "aten::stack", "aten::copy_"}


def test_forward_mode_of_a_projection_runs_the_op_of_both():
    qkv, tangent = torch.randn(2, 2, 9, 3, 2, 8)
    found = torch.func.jvp(ops.attention_packed, (qkv,), (tangent,))
    assert_bitwise(found, ops.attention_dual(*qkv.unbind(2), *tangent.unbind(2))[::2])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(3, 64, 64, 2, 16), (3, 150, 90, 2, 72)])
def test_a_samples_result_does_not_depend_on_its_batch(shape, dtype):
    args = [a.to(dtype) for a in operands(*shape)]
    lengths = as_lengths(7, shape[2], 50)
    assert_independent_of_batch(lambda *a: gradients(lambda *t: ops.attention(*t, key_lengths=a[3]), a[:3]), *args, lengths)


@pytest.mark.parametrize("dtype", FLOATS)
def test_log_sum_exp_is_that_of_the_logits(dtype):
    q, k, v = (t.to(dtype) for t in operands(3, 20, 70, 2, 24))
    lengths = as_lengths(70, 33, 0)
    output, lse = ops.attention(q, k, v, scale=0.3, key_lengths=lengths, return_lse=True)
    assert_bitwise(output, ops.attention(q, k, v, scale=0.3, key_lengths=lengths))
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    logits = 0.3 * torch.einsum("bnhd,bmhd->bhnm", q.double(), k.double())
    truth = torch.stack([logits[0].logsumexp(-1), logits[1, ..., :33].logsumexp(-1)])
    torch.testing.assert_close(lse[:2].double(), truth, rtol=4 * torch.finfo(lse.dtype).eps, atol=4 * torch.finfo(lse.dtype).eps)
    assert (lse[2] == -torch.inf).all()


def test_parts_of_the_keys_are_merged_by_their_log_sum_exp():
    q, k, v = (t.double().requires_grad_() for t in operands(2, 9, 40, 2, 8))
    parts = [ops.attention(q, k[:, i:j], v[:, i:j], return_lse=True) for i, j in ((0, 15), (15, 40))]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(output * (lse - total).exp().transpose(1, 2)[..., None] for output, lse in parts)
    whole = ops.attention(q, k, v)
    torch.testing.assert_close(merged, whole)
    upstream = torch.randn_like(whole)
    for m, w in zip(*(torch.autograd.grad(x, (q, k, v), upstream) for x in (merged, whole)), strict=True):
        torch.testing.assert_close(m, w)


def test_gradient_of_the_log_sum_exp_alone():
    args = [t.double().requires_grad_() for t in operands(2, 9, 40, 2, 8)]
    grads = torch.autograd.grad(ops.attention(*args, return_lse=True)[1].sin().sum(), args[:2])
    expected = torch.autograd.grad(definition.attention(*args)[1].sin().sum(), args[:2])
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("keys", [255, 300, 1100])
def test_gradients_of_one_head_are_summed_over_runs_of_keys(keys):
    args = [t.double() for t in operands(1, 70, keys, 1, 24)]
    lengths = as_lengths(keys - 40)
    ours = gradients(lambda *a: ops.attention(*a, key_lengths=lengths), args)
    expected = gradients(lambda *a: definition.attention(*a, None, lengths)[0], args)
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    assert_independent_of_threads(lambda: gradients(ops.attention, args))


def tangents_of(args, present=(True, True, True)):
    return [torch.randn_like(a) if p else None for a, p in zip(args, present, strict=True)]


def defined_tangents(args, tangents, **options):
    directions = [torch.zeros_like(a) if t is None else t for a, t in zip(args, tangents, strict=True)]
    outputs, derivatives = torch.func.jvp(lambda *a: definition.attention(*a, **options), tuple(args), tuple(directions))
    return *outputs, *derivatives


@pytest.mark.parametrize(
    "present", [(True, True, True), (True, False, False), (False, True, True), (False, False, True), (False, False, False)]
)
@pytest.mark.parametrize(("rows", "keys", "width"), [(64, 64, 16), (70, 333, 24), (5, 130, 5)])
def test_outputs_and_tangents_in_one_pass(rows, keys, width, present):
    args = [t.double() for t in operands(3, rows, keys, 2, width)]
    tangents, lengths = tangents_of(args, present), as_lengths(keys, 3, 0)
    ours = ops.attention_dual(*args, *tangents, scale=0.3, key_lengths=lengths)
    assert_bitwise(ours[:2], ops.attention(*args, scale=0.3, key_lengths=lengths, return_lse=True))
    for a, e in zip(ours, defined_tangents(args, tangents, scale=0.3, key_lengths=lengths), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", NARROW)
def test_tangents_are_as_accurate_as_those_of_eager(dtype):
    args = [t.to(dtype) for t in operands(2, 70, 150, 2, 72)]
    tangents = tangents_of(args)

    def eager_tangent(args, tangents):
        return torch.func.jvp(eager, tuple(args), tuple(tangents))[1]

    truth = eager_tangent([a.double() for a in args], [t.double() for t in tangents])
    assert_within_eager(ops.attention_dual(*args, *tangents)[2], eager_tangent(args, tangents), truth)


def test_forward_mode_runs_the_op_of_both():
    args = operands(2, 9, 40, 2, 8)
    tangents = tangents_of(args)
    output, tangent = torch.func.jvp(ops.attention, tuple(args), tuple(tangents))
    assert_bitwise((output, tangent), ops.attention_dual(*args, *tangents)[::2])


@pytest.mark.parametrize("dtype", FLOATS)
def test_tangents_in_the_padding_never_leak(dtype):
    args = [t.to(dtype) for t in operands(3, 20, 70, 2, 16)]
    tangents, lengths = tangents_of(args), as_lengths(70, 33, 0)
    clean = ops.attention_dual(*args, *tangents, key_lengths=lengths)
    for x in (*args[1:], *tangents[1:]):
        x[1, 33:], x[2] = torch.nan, torch.inf
    assert_bitwise(ops.attention_dual(*args, *tangents, key_lengths=lengths), clean)
    assert_independent_of_batch(lambda *a: ops.attention_dual(*a[:6], key_lengths=a[6]), *args, *tangents, lengths)


def test_threads_change_no_bit():
    args = operands(3, 150, 90, 4, 24)
    assert_independent_of_threads(lambda: gradients(ops.attention, args))


def test_blocks_of_queries_are_invisible():
    q, k, v = operands(1, 200, 40, 1, 16)
    whole = ops.attention(q, k, v)
    assert_bitwise(torch.cat([ops.attention(part, k, v) for part in q.split(64, dim=1)], dim=1), whole)


@pytest.mark.parametrize("asked", range(3))
def test_gradients_that_nobody_asked_for_change_nothing(asked):
    args = operands(2, 70, 33, 2, 24)
    everything = gradients(ops.attention, args)[1:]
    leaves = [a.detach().requires_grad_(i == asked) for i, a in enumerate(args)]
    output = ops.attention(*leaves)
    (alone,) = torch.autograd.grad(output, leaves[asked], torch.cos(output.detach()))
    assert_bitwise(alone, everything[asked])


def test_permuting_keys_changes_nothing_and_permuting_queries_permutes():
    q, k, v = (t.double() for t in operands(2, 9, 21, 2, 8))
    order, other = torch.randperm(21), torch.randperm(9)
    result = ops.attention(q, k, v)
    torch.testing.assert_close(ops.attention(q, k[:, order], v[:, order]), result, rtol=1e-12, atol=1e-12)
    assert_bitwise(ops.attention(q[:, other], k, v), result[:, other])


def test_one_key_is_its_value():
    q, k, v = operands(2, 9, 1, 2, 8)
    assert_bitwise(ops.attention(q, k, v), v.expand(2, 9, 2, 8).contiguous())


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("width", [1, 8, 72, 256])
def test_the_logit_of_one_key_has_a_gradient_of_roundings_alone(width, dtype):
    """Its probability is 1 whatever it is. The gradient is <grad, v> - <grad, output>, two sums of the same products in different orders:
    where eager's softmax gives exactly 0, roundings of these sums may be left."""
    q, k, v = (t.to(dtype) for t in operands(2, 5, 1, 2, width))
    output, grad_q, grad_k, _ = gradients(ops.attention, [q, k, v])
    products = (torch.cos(output) * v).double().abs().sum(-1, keepdim=True)  # [B, N, H, 1]
    left = 4 * torch.finfo(torch.float32).eps * width**-0.5 * products
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (grad_q.abs() <= left * k.abs() + least).all()
    assert (grad_k.abs() <= (left * q.abs()).sum(1, keepdim=True) + least).all()


def test_equal_logits_give_the_mean():
    q, k, v = (t.double() for t in operands(2, 9, 12, 2, 8))
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.0), v.mean(1, keepdim=True).expand(2, 9, 2, 8))


def test_huge_logits_choose_the_nearest_key():
    q, k, v = operands(1, 4, 6, 1, 8)
    nearest = torch.einsum("bnhd,bmhd->bnm", q, k).argmax(-1)[0]
    assert_bitwise(ops.attention(1e4 * q, 1e4 * k, v), v[:, nearest])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_head(bad):
    q, k, v = operands(2, 9, 12, 2, 8)
    clean = ops.attention(q, k, v)
    q[1, 3, 1, 2] = bad
    result = ops.attention(q, k, v)
    assert result[1, 3, 1].isnan().all()
    result[1, 3, 1] = clean[1, 3, 1]
    assert_bitwise(result, clean)


@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 2, 8), (2, 4, 4, 0, 8)])
def test_nothing_gives_zeros(shape):
    args = operands(*shape, requires_grad=True)
    output = ops.attention(*args)
    assert_bitwise(output, torch.zeros_like(args[0]))
    for grad, arg in zip(torch.autograd.grad(output.sum(), args), args, strict=True):
        assert_bitwise(grad, torch.zeros_like(arg))


Q = torch.zeros(2, 3, 2, 4)

REFUSED = {
    "q-type": (lambda: ops.attention(1.0, Q, Q), TypeError, "attention: q must be a tensor; got float"),
    "q-dtype": (lambda: ops.attention(Q.int(), Q, Q), TypeError, "q must be float32.*got torch.int32"),
    "q-dims": (lambda: ops.attention(Q[0], Q, Q), ValueError, r"q must have 4 dimensions; got shape \(3, 2, 4\)"),
    "wide": (
        lambda: ops.attention(*[torch.zeros(1, 1, 1, 257)] * 3),
        ValueError,
        r"q must have a head dimension from 1 to 256; got shape \(1, 1, 1, 257\)",
    ),
    "no-width": (lambda: ops.attention(*[torch.zeros(1, 1, 1, 0)] * 3), ValueError, "q must have a head dimension from 1 to 256"),
    "k-shape": (lambda: ops.attention(Q, Q[:1], Q), ValueError, r"k must have shape \(2, M, 2, 4\).*got \(1, 3, 2, 4\)"),
    "v-width": (lambda: ops.attention(Q, Q, Q[..., :2]), ValueError, r"v must have shape \(2, M, 2, 4\).*got \(2, 3, 2, 2\)"),
    "v-rows": (lambda: ops.attention(Q, Q, Q[:, :2]), ValueError, r"v must have as many rows as k, 3; got shape \(2, 2, 2, 4\)"),
    "k-dtype": (lambda: ops.attention(Q, Q.half(), Q), TypeError, "k must have the dtype of q, torch.float32; got torch.float16"),
    "tangent-shape": (
        lambda: ops.attention_dual(Q, Q, Q, None, Q[:1]),
        ValueError,
        r"attention_dual: t_k must have the shape of k, \(2, 3, 2, 4\); got \(1, 3, 2, 4\)",
    ),
    "tangent-dtype": (
        lambda: ops.attention_dual(Q, Q, Q, Q.half()),
        TypeError,
        "t_q must have the dtype of q, torch.float32; got torch.float16",
    ),
    "dual-q": (lambda: ops.attention_dual(Q[0], Q, Q), ValueError, "attention_dual: q must have 4 dimensions"),
    "device": (lambda: ops.attention(Q, Q, Q.to("meta")), ValueError, "v must be on the device of q, cpu; got meta"),
    "packed-dims": (lambda: ops.attention_packed(Q), ValueError, "attention_packed: qkv must have 5 dimensions"),
    "packed-parts": (
        lambda: ops.attention_packed(torch.zeros(2, 3, 2, 2, 4)),
        ValueError,
        r"qkv must have shape \(B, N, 3, H, D\) with D from 1 to 256; got \(2, 3, 2, 2, 4\)",
    ),
    "packed-lengths": (
        lambda: ops.attention_packed(torch.zeros(2, 3, 3, 2, 4), key_lengths=torch.ones(3, dtype=torch.int64)),
        ValueError,
        r"attention_packed: key_lengths must have shape \(2,\); got \(3,\)",
    ),
    "scale-type": (lambda: ops.attention(Q, Q, Q, scale="1"), TypeError, "scale must be a number or None; got str"),
    "scale-nan": (lambda: ops.attention(Q, Q, Q, scale=float("nan")), ValueError, "scale must be finite; got nan"),
    "lengths-type": (lambda: ops.attention(Q, Q, Q, key_lengths=[1, 2]), TypeError, "key_lengths must be a tensor; got list"),
    "lengths-dtype": (
        lambda: ops.attention(Q, Q, Q, key_lengths=torch.ones(2)),
        TypeError,
        "key_lengths must be int32 or int64; got torch.float32",
    ),
    "lengths-shape": (
        lambda: ops.attention(Q, Q, Q, key_lengths=as_lengths(1, 2, 3)),
        ValueError,
        r"key_lengths must have shape \(2,\); got \(3,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
