"""Normalisation with scale and shift, and gated residuals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fastdiff_kernels import _choices, ops
from fastdiff_kernels._dispatch import TABLE
from fastdiff_kernels._registry import OPS
from fastdiff_kernels.reference import modulate as definition

from ..helpers import (
    assert_accurate,
    assert_bitwise,
    assert_independent_of_batch,
    assert_independent_of_threads,
    assert_within_eager,
    outputs_of,
)
from ..shapes import CHANNELS

NARROW = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
KINDS = ("C", "BC", "B1C", "BNC")


def modulation_shape(kind, shape):
    batch, tokens, channels = shape
    return {"C": (channels,), "BC": (batch, channels), "B1C": (batch, 1, channels), "BNC": (batch, tokens, channels)}[kind]


def rows(modulation):
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def biased(modulation, table, row):
    """Rows that broadcast against x, with the table's row added where there is a table."""
    return rows(modulation) if table is None else rows(modulation) + table.reshape(-1, modulation.shape[-1])[row]


def eager_layer(x, shift, scale, table=None):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + biased(scale, table, 1)) + biased(shift, table, 0)


def eager_rms(x, weight, shift, scale, table=None):
    return F.rms_norm(x, x.shape[-1:], weight, eps=EPS) * (1 + biased(scale, table, 1)) + biased(shift, table, 0)


def eager_gate(residual, branch, gate, table=None):
    return residual + biased(gate, table, 0) * branch


def eager_gated_layer(residual, branch, gate, shift, scale, table=None):
    hidden = eager_gate(residual, branch, gate, table)
    return hidden, eager_layer(hidden, shift, scale, None if table is None else table[1:])


def eager_gated_rms(residual, branch, gate, shift, scale, table=None):
    hidden = eager_gate(residual, branch, gate, table)
    return hidden, eager_rms(hidden, None, shift, scale, None if table is None else table[1:])


def eager_added(residual, branch, shift, scale, table):
    hidden = residual + branch
    return hidden, eager_layer(hidden, shift, scale, table)


def gated_layer(*args, **kwargs):
    return ops.gate_residual_norm_modulate(*args, **kwargs, eps=EPS)


def gated_rms(*args, **kwargs):
    return ops.gate_residual_norm_modulate(*args, **kwargs, norm="rms", eps=EPS)


def with_table(op):
    """op with its table as the last positional argument."""
    return lambda *args: op(*args[:-1], table=args[-1])


def added(residual, branch, shift, scale, table):
    return gated_layer(residual, branch, None, shift, scale, table=table)


# Public function, eager composition, and its operands: x for [B, N, C], m for modulation, w for [C], a digit for a table of as many rows.
CASES = {
    "layer_norm_modulate": (ops.layer_norm_modulate, eager_layer, "xmm"),
    "layer_norm_modulate-table": (with_table(ops.layer_norm_modulate), eager_layer, "xmm2"),
    "rms_norm_modulate": (ops.rms_norm_modulate, eager_rms, "xwmm"),
    "rms_norm_modulate-table": (with_table(ops.rms_norm_modulate), eager_rms, "xwmm2"),
    "gate_residual": (ops.gate_residual, eager_gate, "xxm"),
    "gate_residual-table": (with_table(ops.gate_residual), eager_gate, "xxm1"),
    "gate_residual_norm_modulate": (gated_layer, eager_gated_layer, "xxmmm"),
    "gate_residual_norm_modulate-rms": (gated_rms, eager_gated_rms, "xxmmm"),
    "gate_residual_norm_modulate-table": (with_table(gated_layer), eager_gated_layer, "xxmmm3"),
    "gate_residual_norm_modulate-no-gate": (added, eager_added, "xxmm2"),
}


def shapes_of(pattern, shape, kinds):
    """Shapes of operands; the modulation takes the kinds in turn."""
    kinds = iter(kinds * 3)
    fixed = {"x": shape, "w": shape[2:]}
    return [(int(p), shape[2]) if p.isdigit() else fixed[p] if p in fixed else modulation_shape(next(kinds), shape) for p in pattern]


def operands(pattern, shape, kinds, requires_grad=True):
    """Random operands; the modulation takes the kinds in turn."""
    return [torch.randn(s).requires_grad_(requires_grad) for s in shapes_of(pattern, shape, kinds)]


def gradients(fn, args):
    """Outputs and the gradients of their sum weighted by themselves."""
    leaves = [a.detach().requires_grad_() for a in args]
    outputs = outputs_of(fn(*leaves))
    return (*outputs, *torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs]))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kinds", [["BC"], ["BNC", "C", "B1C"]], ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_eager(case, kinds, dtype):
    op, eager, pattern = CASES[case]
    # The largest of 16,000 errors depends on chance and on the width of the vectors; their mean square is below eager's everywhere.
    assert_accurate(op, eager, operands(pattern, (3, 37, 145), kinds), dtype, factor=3.0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("channels", [8, *CHANNELS.values(), 8192])
@pytest.mark.parametrize("case", ["layer_norm_modulate", "rms_norm_modulate", "gate_residual", "gate_residual_norm_modulate-table"])
def test_widths_of_networks(case, channels, dtype):
    op, eager, pattern = CASES[case]
    assert_accurate(op, eager, operands(pattern, (2, 5, channels), ["BC"]), dtype, factor=3.0)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(1, 40)),
    kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
)
def test_any_shape_and_modulation(case, shape, kinds):
    op, eager, pattern = CASES[case]
    args = [a.detach().double().requires_grad_() for a in operands(pattern, shape, kinds)]
    ours, expected = gradients(op, args), gradients(eager, args)
    # One channel has variance 0, so that the layer norm divides rounding errors by sqrt(eps).
    largest = max([1.0, *(t.abs().max().item() for t in expected if t.numel())])
    for a, e in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9 * largest)


@settings(max_examples=30, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    dtype=st.sampled_from(NARROW),
    layouts=st.lists(st.sampled_from(["contiguous", "chunk", "transposed", "expanded", "reversed"]), min_size=6, max_size=6),
)
def test_any_layout_gives_the_same_bits(case, dtype, layouts):
    op, _, pattern = CASES[case]
    args = [a.to(dtype) for a in operands(pattern, (2, 5, 24), ["BC", "BNC", "B1C"], requires_grad=False)]
    args = [a[:1].expand_as(a) if layout == "expanded" else a for a, layout in zip(args, layouts, strict=False)]
    contiguous = [a.contiguous() for a in args]
    laid_out = [in_layout(a, layout) for a, layout in zip(args, layouts, strict=False)]
    assert_bitwise(gradients_by_leaf(op, laid_out), gradients_by_leaf(op, contiguous))


def in_layout(x, layout):
    """x's values as a view with other strides."""
    if layout == "chunk":
        return torch.cat([torch.full_like(x, float("nan")), x, torch.full_like(x, float("nan"))], -1).chunk(3, dim=-1)[1]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "reversed":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    return x


def gradients_by_leaf(op, args):
    """Outputs and gradients, with each operand's strides kept."""
    leaves = [a.detach().requires_grad_() for a in args]
    outputs = outputs_of(op(*leaves))
    return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, [torch.cos(o.detach()) for o in outputs]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_float32_modulation_beside_a_16_bit_input(case, dtype):
    op, eager, pattern = CASES[case]
    args = operands(pattern, (2, 9, 33), ["BC"], requires_grad=False)
    mixed = [a.to(dtype) if p == "x" else a for p, a in zip(pattern, args, strict=True)]
    results = gradients_by_leaf(op, mixed)
    truth = gradients_by_leaf(eager, [a.double() for a in mixed])
    for result, like in zip(results, [mixed[0]] * len(outputs_of(op(*mixed))) + mixed, strict=True):
        assert result.dtype == like.dtype
        assert result.is_contiguous()
    outputs = len(results) - len(mixed)
    for result, exact in zip(results[:outputs], truth, strict=False):
        assert_within_eager(result, exact.to(dtype), exact, factor=1.0)


@pytest.mark.parametrize("arguments", [(), ("weight",), ("scale",), ("shift",), ("weight", "shift"), ("weight", "scale")], ids="-".join)
def test_rms_norm_without_some_of_its_arguments(arguments):
    x, weight, shift, scale = operands("xwmm", (2, 5, 24), ["BC"])
    given_ = {name: t for name, t in (("weight", weight), ("shift", shift), ("scale", scale)) if name in arguments}
    neutral = {"weight": torch.ones(24), "shift": torch.zeros(2, 24), "scale": torch.zeros(2, 24)}
    result, full = ops.rms_norm_modulate(x, **given_), ops.rms_norm_modulate(x, **{**neutral, **given_})
    assert_bitwise(result, full)
    leaves = [x, *given_.values()]
    assert_bitwise(torch.autograd.grad(result.square().sum(), leaves), torch.autograd.grad(full.square().sum(), leaves))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_nobody_asked_for_change_nothing(kind):
    args = operands("xxmmm", (2, 70, 12), [kind])
    everything = gradients_by_leaf(gated_layer, args)[2:]
    for i in range(len(args)):
        leaves = [a.detach().requires_grad_(i == j) for j, a in enumerate(args)]
        outputs = gated_layer(*leaves)
        (alone,) = torch.autograd.grad(outputs, leaves[i], [torch.cos(o.detach()) for o in outputs])
        torch.testing.assert_close(alone, everything[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_samples_result_does_not_depend_on_its_batch(case):
    op, _, pattern = CASES[case]
    batched = [p in "xm" for p in pattern]
    args = operands(pattern, (3, 70, 33), ["BC", "B1C", "BNC"], requires_grad=False)

    def of_batch(*samples):
        given_ = iter(samples)
        results = gradients_by_leaf(op, [next(given_) if b else a for a, b in zip(args, batched, strict=True)])
        outputs = len(results) - len(args)
        # What all samples share has a gradient that is a sum over them.
        return [r for i, r in enumerate(results) if i < outputs or batched[i - outputs]]

    assert_independent_of_batch(of_batch, *[a for a, b in zip(args, batched, strict=True) if b])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_threads_change_no_bit(case, kind):
    op, _, pattern = CASES[case]
    args = operands(pattern, (3, 150, 257), [kind], requires_grad=False)
    assert_independent_of_threads(lambda: gradients_by_leaf(op, args))


def test_a_table_is_a_bias_of_the_modulation():
    """The rows 2:5 of PixArt's table, as a strided view, beside the chunks of one modulation tensor."""
    x, branch = torch.randn(2, 9, 40), torch.randn(2, 9, 40)
    modulation, table = torch.randn(2, 6, 40), torch.randn(6, 80)[:, ::2].double().float()
    gate, shift, scale = modulation[:, 2:5].unbind(1)
    sums = (modulation + table)[:, 2:5].unbind(1)
    assert_bitwise(gated_layer(x, branch, gate, shift, scale, table=table[2:5]), gated_layer(x, branch, *sums))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_gradient_is_the_sum_over_all_rows(kind):
    args = [a.detach().double().requires_grad_() for a in operands("xxmmm3", (3, 70, 24), [kind])]
    everything = torch.autograd.grad(with_table(gated_layer)(*args), args, [torch.ones(3, 70, 24).double()] * 2)
    summed = [g.reshape(-1, 24).sum(0) for g in everything[2:5]]
    torch.testing.assert_close(everything[5], torch.stack(summed), rtol=1e-12, atol=1e-10)
    (alone,) = torch.autograd.grad(with_table(gated_layer)(*args), args[5:], [torch.ones(3, 70, 24).double()] * 2)
    assert_bitwise(alone, everything[5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", [0, 1])
def test_an_output_that_nobody_used_gives_zeros(output, kind):
    args = operands("xxmmm3", (2, 70, 12), [kind])
    upstream = torch.randn(2, 70, 12)
    alone = torch.autograd.grad(with_table(gated_layer)(*args)[output], args, upstream, materialize_grads=True)
    both = [upstream if i == output else torch.zeros_like(upstream) for i in range(2)]
    assert_bitwise(alone, torch.autograd.grad(with_table(gated_layer)(*args), args, both))


def test_in_one_pass_or_in_two_the_same():
    residual, branch, gate, shift, scale = operands("xxmmm", (2, 9, 65), ["BC"], requires_grad=False)
    hidden = ops.gate_residual(residual, branch, gate)
    assert_bitwise(
        ops.gate_residual_norm_modulate(residual, branch, gate, shift, scale), (hidden, ops.layer_norm_modulate(hidden, shift, scale))
    )
    rms = ops.rms_norm_modulate(hidden, None, shift, scale)
    assert_bitwise(ops.gate_residual_norm_modulate(residual, branch, gate, shift, scale, norm="rms"), (hidden, rms))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_sum_is_normalised_before_it_is_rounded(norm):
    args = [a.bfloat16() for a in operands("xxmmm", (2, 9, 65), ["BC"], requires_grad=False)]
    fused = ops.gate_residual_norm_modulate(*args, norm=norm)[1]
    exact = definition.gate_residual_norm_modulate(*[a.double() for a in args], norm=norm)[1]
    assert_bitwise(fused, exact.bfloat16())


def test_zero_gate_is_the_identity():
    residual, branch = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    assert_bitwise(ops.gate_residual(residual, branch, torch.zeros(9)), residual)


def test_a_constant_row_is_its_shift():
    shift, scale = torch.randn(2, 16), torch.randn(2, 16)
    result = ops.layer_norm_modulate(torch.full((2, 3, 16), 7.25), shift, scale)
    assert_bitwise(result, shift[:, None].expand(2, 3, 16))


def test_a_large_mean_costs_no_digits():
    x, zeros = torch.randn(2, 3, 1152) + 4096, torch.zeros(1152)
    truth = eager_layer(x.double(), zeros.double(), zeros.double())
    assert_within_eager(ops.layer_norm_modulate(x, zeros, zeros), eager_layer(x, zeros, zeros), truth)


def test_permuting_tokens_permutes_the_result():
    x, shift, scale = operands("xmm", (2, 11, 20), ["BC"], requires_grad=False)
    order = torch.randperm(11)
    assert_bitwise(ops.layer_norm_modulate(x[:, order], shift, scale), ops.layer_norm_modulate(x, shift, scale)[:, order])


def test_scaling_the_input_leaves_the_norm():
    x, shift, scale = operands("xmm", (2, 5, 64), ["BC"], requires_grad=False)
    for op in (ops.layer_norm_modulate, lambda *a, **k: ops.rms_norm_modulate(a[0], None, *a[1:], **k)):
        assert_bitwise(op(4 * x, shift, scale, eps=16e-5), op(x, shift, scale, eps=1e-5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad):
    x, shift, scale = operands("xmm", (2, 3, 16), ["BC"], requires_grad=False)
    clean = ops.layer_norm_modulate(x, shift, scale)
    x[1, 2, 5] = bad
    result = ops.layer_norm_modulate(x, shift, scale)
    assert result[1, 2].isnan().all()
    assert_bitwise(result[0], clean[0])
    assert_bitwise(result[1, :2], clean[1, :2])


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_give_zero_gradients(kind):
    for shape in ((0, 4, 8), (2, 0, 8)):
        args = operands("xxmmm", shape, [kind])
        grads = torch.autograd.grad([o.sum() for o in gated_layer(*args)], args)
        for grad, arg in zip(grads, args, strict=True):
            assert_bitwise(grad, torch.zeros_like(arg))


def test_long_sums_keep_their_digits():
    args = operands("xwmm", (2, 5000, 3), ["BC", "C"])
    assert_accurate(ops.rms_norm_modulate, eager_rms, args, torch.float32)


def test_autocast_leaves_the_dtype():
    x, shift, scale = operands("xmm", (2, 3, 8), ["BC"], requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.layer_norm_modulate(x, shift, scale).dtype == torch.float32
        assert ops.layer_norm_modulate(x.bfloat16(), shift, scale).dtype == torch.bfloat16


# What the CUDA kernels refuse is known before anything is launched, of a call and of its gradient alike.
@pytest.mark.parametrize("name", ["layer_norm_modulate", "gate_residual_norm_modulate_backward"])
@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 3, 8), torch.float64, "take float32, bfloat16 and float16"),
        ((2, 3, 16384), torch.float16, "at most 12032 channels; there are 16384"),
        ((70000, 1, 8), torch.float16, "at most 65535 samples; there are 70000"),
        ((2, 3, 12032), torch.float32, None),
    ],
)
def test_what_the_cuda_kernels_refuse(name, shape, dtype, reason):
    x = torch.empty(shape, dtype=dtype, device="meta")
    gradients = [x, x] if name.endswith("backward") else []
    refused = TABLE[name].refuses("cuda", *gradients, x, *[None] * 8)
    assert refused is None if reason is None else reason in refused
    assert TABLE[name].refuses("triton", *gradients, x, *[None] * 8) is None


@pytest.mark.parametrize(("rows", "backend"), [(1024, "cuda"), (1025, None)])
def test_few_rows_on_a_gpu_are_left_to_cuda(rows, backend):
    for op in OPS.values():
        if op.family == "modulate":
            choice = _choices.choose(op.name, ("cuda",), "eager", *op.size(torch.empty(1, rows, 8, device="meta")))
            assert (choice and choice.backend) == backend


X = torch.zeros(2, 3, 4)
M = torch.zeros(2, 4)
W = torch.zeros(4)

REFUSED = {
    "x-type": (lambda: ops.layer_norm_modulate([1.0], M, M), TypeError, "layer_norm_modulate: x must be a tensor; got list"),
    "x-dtype": (lambda: ops.layer_norm_modulate(X.int(), M, M), TypeError, "x must be float32.*got torch.int32"),
    "x-dims": (lambda: ops.layer_norm_modulate(X[0], M, M), ValueError, r"x must have 3 dimensions; got shape \(3, 4\)"),
    "4-d": (lambda: ops.rms_norm_modulate(X[None]), ValueError, r"x must have 3 dimensions; got shape \(1, 2, 3, 4\)"),
    "shift-shape": (
        lambda: ops.layer_norm_modulate(X, torch.zeros(3, 4), M),
        ValueError,
        r"shift must have shape \(2, 4\), \(2, 1, 4\), \(2, 3, 4\) or \(4,\) beside x; got \(3, 4\)",
    ),
    "shift-none": (lambda: ops.layer_norm_modulate(X, None, M), TypeError, "shift must be a tensor; got NoneType"),
    "scale-one-channel": (lambda: ops.layer_norm_modulate(X, M, M[:, :1]), ValueError, r"scale must have shape .*got \(2, 1\)"),
    "scale-0-d": (
        lambda: ops.rms_norm_modulate(X, scale=torch.tensor(0.0)),
        ValueError,
        r"scale must have at least 1 dimension; got shape \(\)",
    ),
    "scale-half": (lambda: ops.layer_norm_modulate(X, M, M.half()), TypeError, "scale must be torch.float32.*got torch.float16"),
    "scale-double": (
        lambda: ops.layer_norm_modulate(X.half(), M, M.double()),
        TypeError,
        r"scale must be torch.float16 \(that of x\) or torch.float32; got torch.float64",
    ),
    "float32-beside-double": (
        lambda: ops.layer_norm_modulate(X.double(), M, M),
        TypeError,
        "shift must be torch.float64.*got torch.float32",
    ),
    "device": (lambda: ops.layer_norm_modulate(X, M, M.to("meta")), ValueError, "scale must be on the device of x, cpu; got meta"),
    "weight-shape": (lambda: ops.rms_norm_modulate(X, M), ValueError, r"weight must have shape \(4,\); got \(2, 4\)"),
    "weight-dtype": (lambda: ops.rms_norm_modulate(X, W.double()), TypeError, "weight must be torch.float32.*got torch.float64"),
    "branch-shape": (
        lambda: ops.gate_residual(X, X[:1], M),
        ValueError,
        r"branch must have the shape of residual, \(2, 3, 4\); got \(1, 3, 4\)",
    ),
    "branch-dtype": (lambda: ops.gate_residual(X, X.half(), M), TypeError, "branch must have the dtype of residual"),
    "gate-shape": (lambda: ops.gate_residual(X, X, torch.zeros(3)), ValueError, r"gate must have shape .*beside residual; got \(3,\)"),
    "table-rows": (
        lambda: ops.layer_norm_modulate(X, M, M, table=torch.zeros(3, 4)),
        ValueError,
        r"layer_norm_modulate: table must have shape \(2, 4\) beside x; got \(3, 4\)",
    ),
    "table-1-d": (lambda: ops.rms_norm_modulate(X, table=W), ValueError, r"table must have shape \(2, 4\) beside x; got \(4,\)"),
    "table-of-a-gate": (
        lambda: ops.gate_residual(X, X, M, table=M),
        ValueError,
        r"table must have shape \(4,\) or \(1, 4\) beside residual; got \(2, 4\)",
    ),
    "table-without-gate": (
        lambda: ops.gate_residual_norm_modulate(X, X, None, M, M, table=torch.zeros(3, 4)),
        ValueError,
        r"table must have shape \(2, 4\) beside residual; got \(3, 4\)",
    ),
    "table-dtype": (lambda: ops.layer_norm_modulate(X, M, M, table=M.half()), TypeError, "table must be torch.float32.*got torch.float16"),
    "table-type": (lambda: ops.gate_residual(X, X, M, table=1.0), TypeError, "gate_residual: table must be a tensor; got float"),
    "no-gate": (lambda: ops.gate_residual(X, X, None), TypeError, "gate_residual: gate must be a tensor; got NoneType"),
    "norm": (
        lambda: ops.gate_residual_norm_modulate(X, X, M, M, M, norm="batch"),
        ValueError,
        "gate_residual_norm_modulate: norm must be one of 'layer', 'rms'; got 'batch'",
    ),
    "eps-zero": (lambda: ops.layer_norm_modulate(X, M, M, eps=0), ValueError, "eps must be finite and greater than 0; got 0"),
    "eps-nan": (lambda: ops.rms_norm_modulate(X, eps=float("nan")), ValueError, "eps must be finite and greater than 0; got nan"),
    "eps-type": (lambda: ops.gate_residual_norm_modulate(X, X, M, M, M, eps="1"), TypeError, "eps must be a number; got str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_by_name(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
