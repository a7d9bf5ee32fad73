"""Triton kernels of attention against their definition, and PyTorch's libraries behind the same op."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import fastdiff_kernels
from fastdiff_kernels import _backends, _choices, _sdpa, ops
from fastdiff_kernels._companions import TABLE
from fastdiff_kernels._registry import OPS
from fastdiff_kernels.reference import attention as definition
from fastdiff_kernels.triton import _attention_tiles, attention
from tests.helpers import assert_bitwise, assert_within_eager, cast
from tests.shapes import HEAD_WIDTHS
from tests.triton.drawing import few_examples
from tests.triton.running import check_budgets, run_interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Query and key rows: whole blocks of them, and parts; the text of Stable Diffusion is 77 keys.
ROWS = ((100, 100), (64, 64), (70, 77), (64, 33), (33, 64), (40, 70), (34, 40))
# With the heads' widths of networks and with widths that are nobody's; a head is a program of its own, so that two stand for all.
SHAPES = [(1, *ROWS[i % len(ROWS)], 1 + i % 2, width) for i, width in enumerate((*HEAD_WIDTHS, 96, 5))]


def operands(shape, dtype, device="cpu", tangents=False):
    batch, queries, keys, heads, width = shape
    rows = (queries, keys, keys) * (2 if tangents else 1)
    return [torch.randn(batch, n, heads, width, device=device).to(dtype) for n in rows]


def upstream(q, seed=3):
    generator = torch.Generator(q.device).manual_seed(seed)
    batch, rows, heads, _ = q.shape
    grad = torch.randn(q.shape, generator=generator, device=q.device).to(q.dtype)
    return grad, torch.randn(batch, heads, rows, generator=generator, device=q.device)


def launched(q, k, v, scale, lengths, needs=(True, True, True), of_lse=True):
    """Outputs and gradients of the kernels."""
    out, lse = attention.attention(q, k, v, scale, lengths)
    grad, grad_lse = upstream(q)
    return out, lse, *attention.attention_backward(grad, grad_lse if of_lse else None, q, k, v, scale, lengths, out, lse, needs)


def composed(q, k, v, scale):
    """What a user would write, in the inputs' own dtype; its log-sum-exp in float32."""
    logits = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    lse = logits.to(torch.float64 if q.dtype == torch.float64 else torch.float32).logsumexp(-1)
    return torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v), lse


def differentiated(fn, q, k, v, scale, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    outputs = fn(*leaves, scale)
    grads = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream(q), outputs, strict=True)])
    return [*(o.detach() for o in outputs), *grads]


@pytest.mark.executes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype, device):
    q, k, v = operands(shape, dtype, device)
    scale = shape[-1] ** -0.5
    results = (
        launched(q, k, v, scale, None),
        differentiated(composed, q, k, v, scale),
        differentiated(composed, q, k, v, scale, torch.float64),
    )
    # The interpreter cuts float32 off where it stores bfloat16; gradients have the rounding of the log-sum-exp they begin from.
    for actual, eager, truth in zip(*results, strict=True):
        assert actual.dtype == eager.dtype
        assert_within_eager(actual, eager, truth, factor=4.0)


@pytest.mark.executes
@pytest.mark.parametrize("stored", ["stepped", "expanded", "column"])
def test_lengths_may_lie_anywhere(stored, device):
    q, k, v, *tangents = operands((3, 20, 64, 1, 16), torch.float32, device, tangents=True)
    steps = torch.tensor([33, 1, 5, 64, 20, 7], device=device)
    lengths = {"stepped": steps[::2], "expanded": steps[:1].expand(3), "column": steps.view(3, 2)[:, 1]}[stored]
    assert_bitwise(launched(q, k, v, 0.3, lengths), launched(q, k, v, 0.3, lengths.clone()))
    assert_bitwise(
        attention.attention_dual(q, k, v, 0.3, lengths, *tangents), attention.attention_dual(q, k, v, 0.3, lengths.clone(), *tangents)
    )


@pytest.mark.parametrize("strides", [(2**31, 64, 16, 1), (2**20, 2**23, 16, 1), (2**20, 16, 2**31, 1)], ids=["samples", "rows", "heads"])
def test_what_32_bits_do_not_reach_is_copied(strides):
    x = torch.empty_strided((2, 8, 3, 16), strides, dtype=torch.float16, device="meta")
    assert _attention_tiles.aligned(x).is_contiguous()


def test_samples_beyond_32_bits_are_refused():
    large, small = (torch.empty(1, n, 4, 64, device="meta", dtype=torch.float16) for n in (2**22, 8))
    refuses, why = OPS["attention"].refuses, "its Triton kernels reach 2^31 elements of a sample, of a whole projection"
    assert refuses("triton", large, small, small, 0.1, None) == why
    assert refuses("triton", small, large, large, 0.1, None) == why
    assert refuses("triton", small, small, small, 0.1, None) is None


@pytest.mark.executes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [72, 16])
def test_what_stands_in_the_padding_never_leaks(width, dtype, device):
    q, k, v = operands((4, 20, 64, 1, width), dtype, device)
    lengths = torch.tensor([70, 33, 1, -2], device=device)
    clean = launched(q, k, v, 0.3, lengths)
    if dtype == torch.float32:
        eager, truth = (differentiated(lambda *x: definition.attention(*x, lengths), q, k, v, 0.3, wide) for wide in (None, torch.float64))
        for a, e, t in zip(clean, eager, truth, strict=True):
            assert_within_eager(*(x.nan_to_num(neginf=0) for x in (a, e, t)), factor=4.0)
    for b, length in enumerate(lengths.clamp(0, 64).tolist()):
        k[b, length:], v[b, length:] = torch.nan, torch.inf
    assert_bitwise(launched(q, k, v, 0.3, lengths), clean)
    out, lse, grad_q, grad_k, grad_v = clean
    assert not torch.cat([out[3], grad_q[3]]).any()
    assert (lse[3] == -torch.inf).all()
    for b, length in enumerate(lengths.clamp(0, 64).tolist()):
        assert not torch.cat([grad_k[b, length:], grad_v[b, length:]]).any()


@pytest.mark.executes
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scale_has_any_sign(scale, device):
    q, k, v = operands((2, 20, 40, 1, 8), torch.float32, device)
    results = (
        launched(q, k, v, scale, None),
        differentiated(composed, q, k, v, scale),
        differentiated(composed, q, k, v, scale, torch.float64),
    )
    for actual, eager, truth in zip(*results, strict=True):
        assert_within_eager(actual, eager, truth, factor=4.0)
    tangents = operands((2, 20, 40, 1, 8), torch.float32, device)
    for actual, expected in zip(
        attention.attention_dual(q, k, v, scale, None, *tangents), jvp(q, k, v, scale, None, tangents), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.executes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 5])
def test_one_projection_is_its_parts(width, dtype, device):
    qkv = torch.randn(2, 33, 3, 2, width, device=device).to(dtype)
    parts = launched(*qkv.unbind(2), 0.2, None)
    output, lse = attention.attention_packed(qkv, 0.2, None)
    gradient = attention.attention_packed_backward(*upstream(qkv[:, :, 0]), qkv, 0.2, None, output, lse, [True])
    assert_bitwise((output, lse, gradient), (*parts[:2], torch.stack(parts[2:], 2)))


@pytest.mark.executes
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_any_strides(dtype, device):
    packed = torch.randn(2, 33, 3, 2, 24, device=device).to(dtype)
    parts = packed.unbind(2)
    expected = launched(*(x.contiguous() for x in parts), 0.2, None)
    assert_bitwise(launched(*parts, 0.2, None), expected)
    # EDM's projection: channels, then q, k, v, then pixels.
    turned = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in parts]
    assert_bitwise(launched(*turned, 0.2, None), expected)
    shifted = [torch.empty(x.numel() + 1, device=device, dtype=dtype)[1:].view(x.shape).copy_(x) for x in parts]
    assert_bitwise(launched(*shifted, 0.2, None), expected)


@pytest.mark.executes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neither_batch_nor_repetition_changes_a_bit(dtype, device):
    q, k, v = operands((3, 70, 50, 1, 72), dtype, device)
    lengths = torch.tensor([7, 50, 40], device=device)
    whole = launched(q, k, v, 0.2, lengths)
    assert_bitwise(launched(q, k, v, 0.2, lengths), whole)
    out, lse = attention.attention(q[1:2], k[1:2], v[1:2], 0.2, lengths[1:2])
    assert_bitwise((out, lse), [w[1:2] for w in whole[:2]])
    grads = [g[1:2] for g in upstream(q)]
    alone = attention.attention_backward(*grads, q[1:2], k[1:2], v[1:2], 0.2, lengths[1:2], out, lse, [True] * 3)
    assert_bitwise(alone, [w[1:2] for w in whole[2:]])


@pytest.mark.executes
@pytest.mark.parametrize("asked", range(3))
def test_gradients_that_nobody_asked_for_change_nothing(asked, device):
    q, k, v = operands((1, 33, 40, 1, 72), torch.float32, device)
    everything = launched(q, k, v, 0.2, None)[2:]
    some = launched(q, k, v, 0.2, None, needs=[i == asked for i in range(3)])[2:]
    assert_bitwise(some[asked], everything[asked])
    assert [g.numel() for i, g in enumerate(some) if i != asked] == [0, 0]
    separate = [launched(q, k, v, 0.2, None, needs=[False, i == 1, i == 2])[2 + i] for i in (1, 2)]
    assert_bitwise(separate, everything[1:])


@pytest.mark.executes
def test_gradient_through_the_log_sum_exp_alone(device):
    q, k, v = operands((1, 20, 40, 1, 16), torch.float32, device)
    out, lse = attention.attention(q, k, v, 0.2, None)
    grad_lse = upstream(q)[1]
    grads = attention.attention_backward(None, grad_lse, q, k, v, 0.2, None, out, lse, [True] * 3)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(definition.attention(*leaves, 0.2)[1], leaves, grad_lse.double(), materialize_grads=True)
    for grad, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), e, rtol=1e-4, atol=1e-6)


def jvp(q, k, v, scale, lengths, tangents):
    """Outputs and tangents of the definition in float64."""
    primals = [x.double() for x in (q, k, v)]
    directions = [torch.zeros_like(p) if t is None else t.double() for p, t in zip(primals, tangents, strict=True)]
    outputs, derivatives = torch.func.jvp(lambda *x: definition.attention(*x, scale, lengths), tuple(primals), tuple(directions))
    return *outputs, *derivatives


@pytest.mark.executes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 40, 70, 2, 72), (1, 33, 64, 1, 128), (1, 9, 33, 2, 5), (1, 16, 64, 1, 256)])
def test_forward_mode_is_as_accurate_as_the_definition(shape, dtype, device):
    if OPS["attention_dual"].refuses("triton", *operands(shape, dtype)):
        pytest.skip("float32 heads wider than 128 run the definition")
    q, k, v, *tangents = operands(shape, dtype, device, tangents=True)
    found = attention.attention_dual(q, k, v, 0.2, None, *tangents)
    eager = definition.attention_dual(q, k, v, 0.2, None, *tangents)
    for actual, e, truth in zip(found, eager, jvp(q, k, v, 0.2, None, tangents), strict=True):
        assert actual.dtype == e.dtype
        # The definition rounds once at the end; what the products of 16-bit numbers lose is a few roundings of their factors.
        bound = e if dtype == torch.float32 else truth.to(dtype) * (1 + torch.finfo(dtype).eps)
        assert_within_eager(actual, bound, truth, factor=4.0)


@pytest.mark.executes
@pytest.mark.parametrize("present", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)])
def test_absent_tangents_are_zero(present, device):
    q, k, v, *tangents = operands((2, 20, 40, 1, 24), torch.float32, device, tangents=True)
    lengths = torch.tensor([33, 0], device=device)
    tangents = [t if p else None for t, p in zip(tangents, present, strict=True)]
    found = attention.attention_dual(q, k, v, 0.2, lengths, *tangents)
    assert_bitwise(found[:2], attention.attention(q, k, v, 0.2, lengths))
    for actual, expected in zip(found, jvp(q, k, v, 0.2, lengths, tangents), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.executes
@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 4, 0, 2, 8), (2, 4, 4, 0, 8)])
def test_nothing_gives_zeros(shape, device):
    q, k, v, *tangents = operands(shape, torch.float32, device, tangents=True)
    out, lse, *grads = launched(q, k, v, 0.2, None)
    assert (lse == -torch.inf).all()
    assert not any(x.any() for x in (out, *grads))
    assert not any(x.any() for x in attention.attention_dual(q, k, v, 0.2, None, *tangents)[2:])


@pytest.mark.executes
@few_examples
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 20), st.integers(1, 20), st.integers(1, 2), st.integers(1, 40)),
    scale=st.sampled_from([0.0, -0.7, 0.3]),
    data=st.data(),
)
def test_any_shape_and_any_lengths(shape, scale, data, device):
    batch, _, keys, _, _ = shape
    given_ = data.draw(st.none() | st.lists(st.integers(-2, keys + 3), min_size=batch, max_size=batch))
    lengths = None if given_ is None else torch.tensor(given_, dtype=torch.int64, device=device)
    q, k, v = operands(shape, torch.float32, device)
    truth = differentiated(lambda *args: definition.attention(*args, lengths), q, k, v, scale, torch.float64)
    for actual, exact in zip(launched(q, k, v, scale, lengths), truth, strict=True):
        torch.testing.assert_close(actual, exact.float(), rtol=1e-5, atol=1e-5)


def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.parametrize(
    ("width", "held"), [(8, 16), (24, 32), (40, 48), (72, 80), (80, 80), (96, 96), (112, 128), (160, 160), (200, 256), (256, 256)]
)
def test_a_width_is_padded_as_little_as_two_powers_of_two_allow(width, held):
    assert sum(_attention_tiles.pieces(width)) == held


def case(width, dtype, queries=1040, keys=1040, forward=True, backward=True, dual=True):
    def launch_all():
        q, k, v = operands((1, queries, keys, 2, width), dtype)
        out, lse = q, torch.empty(1, 2, queries)
        if forward:
            attention.attention(q, k, v, 0.2, None)
        if backward:
            attention.attention_backward(out, None, q, k, v, 0.2, None, out, lse, [True] * 3)
        if dual:
            attention.attention_dual(q, k, v, 0.2, None, q, k, v)

    return launch_all


def test_launches_stay_in_their_budgets(monkeypatch):
    cases = {
        "dit 72": case(72, torch.bfloat16),
        "edm 256": case(256, torch.float16, 256, 256, dual=False),
        "float32 128": case(128, torch.float32, backward=False, dual=False),
        "dual 96": case(96, torch.bfloat16, forward=False, backward=False),
        "dual float32 48": case(48, torch.float32, forward=False, backward=False),
    }
    check_budgets("attention", cases, monkeypatch)


# PyTorch's own libraries.


def heads_of(width, dtype=torch.bfloat16, rows=1024, device="meta"):
    return torch.empty(2, rows, 3, 4, width, dtype=dtype, device=device).unbind(2)


@pytest.mark.parametrize("prefers_cudnn", [False, True])
def test_libraries_take_what_they_are_given(prefers_cudnn, monkeypatch):
    """Shapes and layouts through ATen's entry points, on tensors without data."""
    monkeypatch.setattr(_sdpa, "_prefers_cudnn", lambda *_: prefers_cudnn)
    q, k, v = heads_of(64)
    out, lse = _sdpa.attention(q, k, v, 0.1, None)
    expected_out, expected_lse = OPS["attention"].fake(q)
    for actual, expected in ((out, expected_out), (lse, expected_lse)):
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())
    grad_q, grad_k, grad_v = _sdpa.attention_backward(torch.empty_like(out), None, q, k, v, 0.1, None, out, lse, [True, False, True])
    assert grad_q.shape == grad_v.shape == q.shape
    assert grad_k.numel() == 0


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: (*heads_of(64, torch.float32), 0.1, None), "take bfloat16 and float16; got torch.float32"),
        (lambda: (*heads_of(64), 0.1, torch.ones(2)), "know no key_lengths"),
        (lambda: (*heads_of(64), -0.1, None), "need a positive scale; got -0.1"),
        (lambda: (*heads_of(64, rows=0), 0.1, None), "nothing to attend to"),
        (lambda: (*heads_of(20), 0.1, None), "rows of 8 adjacent elements"),
        (lambda: (*(x.transpose(1, 3) for x in heads_of(64)), 0.1, None), "rows of 8 adjacent elements"),
    ],
)
def test_libraries_refuse_with_a_reason(call, reason):
    args = call()
    assert reason in OPS["attention"].refuses("sdpa", *args)


@pytest.mark.parametrize("packed", [False, True])
def test_libraries_refuse_the_gradient_of_the_log_sum_exp(packed, monkeypatch):
    """Forced they say so, as nothing falls back; otherwise the next backend has it."""
    monkeypatch.setattr(_backends, "unavailable", lambda *_: None)
    qkv = torch.empty(2, 1024, 3, 4, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    call, inputs = (ops.attention_packed, (qkv,)) if packed else (ops.attention, qkv.unbind(2))
    with fastdiff_kernels.backend("sdpa"):
        out, lse = call(*inputs, return_lse=True)
        for outputs in ([lse], [out, lse]):
            with pytest.raises(RuntimeError, match=r"sdpa.* cannot run attention.*_backward: .* none of the log-sum-exp"):
                torch.autograd.grad([o.sum() for o in outputs], qkv, retain_graph=True)
        assert torch.autograd.grad(out.sum(), qkv, retain_graph=True)[0].shape == qkv.shape
    op = TABLE["attention_packed_backward" if packed else "attention_backward"]
    backward = (out, lse, *(x.detach() for x in inputs), 0.1, None, out, lse, [True] * len(inputs))
    assert [name for name in op.kernels if _backends.refusal(op, name, backward) is None] == ["cpu", "triton"]


def test_libraries_run_where_the_table_says_so():
    assert OPS["attention"].refuses("sdpa", *heads_of(64), 0.1, None) is None
    for width, rows, expected in ((64, 4096, "sdpa"), (128, 1024, "sdpa"), (64, 256, None), (72, 4096, None)):
        choice = _choices.choose("attention", ("sm_90", "cuda"), "eager", rows, width)
        assert (choice and choice.backend) == expected


def test_determinism_is_asked_for_and_given_back():
    before = torch.are_deterministic_algorithms_enabled()
    for enabled in (False, True):
        torch.use_deterministic_algorithms(enabled)
        with _sdpa._deterministic():
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled() == enabled
    torch.use_deterministic_algorithms(before)


def test_float64_is_refused_by_the_kernels():
    args = (*operands((1, 4, 4, 1, 8), torch.float64), 0.1, None)
    assert "float32, bfloat16 and float16" in OPS["attention"].refuses("triton", *args)


# Kernels on a device.

NETWORKS = [
    (256, 256, 1, 256), (64, 64, 1, 256), (1024, 1024, 6, 64), (256, 256, 16, 72), (1024, 1024, 16, 72), (4096, 4096, 16, 72),
    (4096, 120, 16, 72), (4096, 4096, 8, 40), (1024, 1024, 8, 80), (256, 256, 8, 160), (4096, 4096, 10, 64), (4608, 4608, 24, 128),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", NETWORKS, ids=str)
@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_as_accurate_as_pytorchs_attention_on_a_gpu(shape, dtype, name):
    queries, keys, heads, width = shape
    q, k, v = operands((2, queries, keys, heads, width), dtype, "cuda")
    if (reason := OPS["attention"].refuses(name, q, k, v, width**-0.5, None)) is not None:
        pytest.skip(reason)

    def run(fn, args):
        leaves = [x.detach().requires_grad_() for x in args]
        output = fn(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, upstream(q)[0].to(output.dtype))

    def sdpa(*args):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in args)).transpose(1, 2)

    # One head and one sample in float64: all of them would not fit.
    truth = run(sdpa, cast([x[:1, :, :1] for x in (q, k, v)], torch.float64)) if keys <= 1024 else None
    with fastdiff_kernels.backend(name):
        ours, again = run(ops.attention, (q, k, v)), run(ops.attention, (q, k, v))
    assert_bitwise(ours, again)
    for i, (actual, library) in enumerate(zip(ours, run(sdpa, (q, k, v)), strict=True)):
        if truth is None:
            torch.testing.assert_close(actual, library, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        elif i == 0:
            assert_within_eager(actual[:1, :, :1], library[:1, :, :1], truth[0])
        else:
            torch.testing.assert_close(actual.float(), library.float(), rtol=4 * torch.finfo(dtype).eps, atol=0.02)
