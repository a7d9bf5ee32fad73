"""Triton kernels of the modulation family against their definitions, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_kernels._registry import OPS
from fastdiff_kernels.reference import modulate as definition
from fastdiff_kernels.triton import _sums, modulate
from tests.helpers import assert_bitwise, assert_within_eager, outputs_of
from tests.shapes import CHANNELS
from tests.triton.drawing import few_examples
from tests.triton.running import check_budgets, run_interpreted

EPS = 1e-5
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float64, torch.float64))
MODULATIONS = {"C": (2,), "BC": (0, 2), "B1C": (0, None, 2), "BNC": (0, 1, 2)}


def modulation(kind, shape, dtype, device):
    return torch.randn([1 if i is None else shape[i] for i in MODULATIONS[kind]], device=device).to(dtype)


def calls_of(shape, kinds, dtype, modulation_dtype, device):
    """Arguments of one call of every op: modulation of the kinds named, beside a weight and beside none, with a table and without."""
    x, branch = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    gate, shift, scale = (modulation(kind, shape, modulation_dtype, device) for kind in kinds)
    weight, wide = (torch.randn(s, device=device).to(modulation_dtype) for s in ((shape[2],), (6, 2 * shape[2])))
    table = wide[2:5, ::2]
    return [
        ("layer_norm_modulate", (x, shift, scale, None, EPS)),
        ("layer_norm_modulate", (x, shift, scale, table[1:], EPS)),
        ("rms_norm_modulate", (x, weight, shift, scale, table[1:], EPS)),
        ("rms_norm_modulate", (x, None, None, scale, None, EPS)),
        ("rms_norm_modulate", (x, None, None, None, None, EPS)),
        ("gate_residual", (x, branch, gate, None)),
        ("gate_residual", (x, branch, gate, table[0])),
        ("gate_residual_norm_modulate", (x, branch, gate, shift, scale, None, "rms", EPS)),
        ("gate_residual_norm_modulate", (x, branch, gate, shift, scale, table, "layer", EPS)),
        ("gate_residual_norm_modulate", (x, branch, None, shift, scale, table[1:], "layer", EPS)),
    ]


def tensors_of(args):
    return [a for a in args if isinstance(a, torch.Tensor)]


def defined(name, args, upstream, dtype):
    """Outputs and gradients of the definition, with everything in dtype or, for None, as it is."""
    leaves = [a.detach().to(dtype or a.dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    outputs = outputs_of(getattr(definition, name)(*leaves))
    grads = torch.autograd.grad(outputs, tensors_of(leaves), [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    return [*(o.detach() for o in outputs), *grads]


def differentiable(args):
    """The arguments that have a gradient, absent ones included."""
    return [a for a in args if a is None or isinstance(a, torch.Tensor)]


def launched(name, args, upstream):
    """Outputs and gradients of the kernels."""
    outputs = outputs_of(getattr(modulate, name)(*args))
    needs = [a is not None for a in differentiable(args)]
    grads = getattr(modulate, f"{name}_backward")(*upstream, *args, needs)
    assert all(g.numel() == 0 for g, need in zip(grads, needs, strict=True) if not need)
    return [*outputs, *(g for g, need in zip(grads, needs, strict=True) if need)]


def upstream_of(name, x):
    return [torch.randn(x.shape, device=x.device).to(x.dtype) for _ in range(2 if name == "gate_residual_norm_modulate" else 1)]


def check(name, args):
    """Outputs and gradients are as near the float64 truth as the definition's in the same dtype."""
    upstream = upstream_of(name, args[0])
    results = launched(name, args, upstream), defined(name, args, upstream, None), defined(name, args, upstream, torch.float64)
    for actual, eager, truth in zip(*results, strict=True):
        assert actual.dtype == eager.dtype
        if args[0].dtype == torch.float64:
            # The definition is the truth here, and its sums are in another order.
            torch.testing.assert_close(actual, truth, rtol=1e-13, atol=1e-13)
        else:
            assert_within_eager(actual, eager, truth, factor=4.0)


@pytest.mark.executes
@pytest.mark.parametrize(
    ("shape", "kinds", "dtypes"),
    [
        ((2, 11, 40), ("BC", "BC", "BC"), DTYPES[0]),
        ((2, 3, 24), ("BNC", "B1C", "BNC"), DTYPES[1]),
        ((1, 9, 65), ("C", "BNC", "C"), DTYPES[2]),
        ((3, 1, 8), ("B1C", "C", "BC"), DTYPES[3]),
        ((2, 2, 1), ("BC", "BC", "C"), DTYPES[0]),
    ],
)
def test_as_accurate_as_the_definition(shape, kinds, dtypes, device):
    for name, args in calls_of(shape, kinds, *dtypes, device):
        check(name, args)


# And the ends of what is supported; the rows are few, and end within a tile.
@pytest.mark.executes
@pytest.mark.parametrize("channels", [8, *CHANNELS.values(), 8192])
def test_widths_of_networks(channels, device):
    residual, branch = torch.randn(2, 1, 3, channels, device=device).to(torch.bfloat16)
    gate, shift, scale = torch.randn(1, 6 * channels, device=device).chunk(6, dim=1)[2:5]
    weight, table = torch.randn(channels, device=device), torch.randn(6, channels, device=device)[2:5]
    check("layer_norm_modulate", (residual, shift, scale, table[1:], EPS))
    check("rms_norm_modulate", (residual, weight, None, scale, None, EPS))
    check("gate_residual", (residual, branch, gate, table[0]))
    check("gate_residual_norm_modulate", (residual, branch, gate, shift, scale, table, "layer", EPS))


@pytest.mark.executes
def test_three_sums_over_wide_rows_of_float32(device):
    check(*calls_of((1, 3, 4100), ("BC", "C", "BC"), torch.float32, torch.float32, device)[8])


@pytest.mark.executes
@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_nobody_used(unused, device):
    for kinds in (("BC", "C", "B1C"), ("BNC", "BNC", "BNC")):
        name, args = calls_of((2, 19, 24), kinds, torch.float32, torch.float32, device)[8]
        upstream = upstream_of(name, args[0])
        needs = [True] * 6
        given = [None if i == unused else u for i, u in enumerate(upstream)]
        zeros = [torch.zeros_like(u) if i == unused else u for i, u in enumerate(upstream)]
        expected = modulate.gate_residual_norm_modulate_backward(*zeros, *args, needs)
        for actual, e in zip(modulate.gate_residual_norm_modulate_backward(*given, *args, needs), expected, strict=True):
            torch.testing.assert_close(actual, e, rtol=1e-6, atol=1e-6)


@pytest.mark.executes
def test_reads_strided_operands_in_place(device):
    wide = torch.randn(2, 5, 3 * 16, device=device)
    x, branch = wide.chunk(3, dim=2)[1:]
    gate, shift, scale = torch.randn(2, 6 * 16, device=device).chunk(6, dim=1)[2:5]
    args = (x, branch, gate, shift, scale, None, "layer", EPS)
    contiguous = tuple(a.contiguous() if isinstance(a, torch.Tensor) else a for a in args)
    upstream = upstream_of("gate_residual_norm_modulate", x)
    expected = launched("gate_residual_norm_modulate", contiguous, upstream)
    assert_bitwise(launched("gate_residual_norm_modulate", args, upstream), expected)
    transposed = (x.transpose(1, 2).contiguous().transpose(1, 2), *args[1:3], shift.t().contiguous().t(), *args[4:])
    assert_bitwise(launched("gate_residual_norm_modulate", transposed, upstream), expected)


@pytest.mark.executes
def test_a_samples_result_does_not_depend_on_its_batch(device):
    for name, args in calls_of((4, 10, 24), ("BC", "B1C", "BNC"), torch.float32, torch.float32, device)[7:9]:
        upstream = upstream_of(name, args[0])
        part = [slice(1, 2) if isinstance(a, torch.Tensor) and a.shape[0] == 4 else None for a in args]
        alone = launched(name, [a if s is None else a[s] for a, s in zip(args, part, strict=True)], [u[1:2] for u in upstream])
        for one, all_four in zip(alone, launched(name, args, upstream), strict=True):
            if all_four.shape[0] == 4:
                assert_bitwise(one, all_four[1:2])


@pytest.mark.executes
def test_long_sums_are_added_in_stages(device, monkeypatch):
    monkeypatch.setattr(_sums, "ROWS_PER_CHUNK", 2)
    for name, args in calls_of((3, 19, 8), ("BC", "C", "B1C"), torch.float32, torch.float32, device)[:3]:
        upstream = upstream_of(name, args[0])
        results = launched(name, args, upstream), defined(name, args, upstream, None), defined(name, args, upstream, torch.float64)
        for actual, eager, truth in zip(*results, strict=True):
            assert_within_eager(actual, eager, truth, factor=4.0)


@pytest.mark.executes
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_no_rows(shape, device):
    for name, args in calls_of(shape, ("BC", "C", "B1C"), torch.float32, torch.float32, device):
        for result in launched(name, args, upstream_of(name, args[0])):
            assert not result.any()


@pytest.mark.executes
@few_examples
@given(
    call=st.integers(0, 9),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 40)),
    kinds=st.tuples(*[st.sampled_from(sorted(MODULATIONS))] * 3),
)
def test_any_shape_and_modulation(call, shape, kinds, device):
    check(*calls_of(shape, kinds, torch.float64, torch.float64, device)[call])


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_refuses_float64_rows_that_its_registers_do_not_hold():
    refuses = OPS["layer_norm_modulate"].refuses
    assert refuses("triton", torch.empty(1, 1, 3072, dtype=torch.float64)) is None
    assert "at most 3072 channels in float64; there are 5000" in refuses("triton", torch.empty(1, 1, 5000, dtype=torch.float64))


def budget_case(channels, dtype, picked):
    """Forward and backward of the calls picked."""
    calls = calls_of((1, 16, channels), ("BC", "BC", "BC"), dtype, torch.float32, "cpu")

    def launch_all():
        for name, args in (calls[i] for i in picked):
            launched(name, args, upstream_of(name, args[0]))

    return launch_all


def test_launch_budgets(monkeypatch):
    """Widths of DiT-XL/2, an EDM block, Flux.2 and Z-Image: rows held by a part of a warp, by warps, and too wide to be held twice."""
    narrow = calls_of((1, 16, 6144), ("BC", "BC", "BC"), torch.bfloat16, torch.bfloat16, "cpu")[8][1]
    cases = {
        "1152 bfloat16": budget_case(1152, torch.bfloat16, (8,)),
        "256 float32": budget_case(256, torch.float32, (2,)),
        "6144 bfloat16": budget_case(6144, torch.bfloat16, (8,)),
        "6144 bfloat16 throughout": lambda: modulate.gate_residual_norm_modulate(*narrow),
        "3840 bfloat16, RMS norm": budget_case(3840, torch.bfloat16, (7,)),
    }
    check_budgets("modulate", cases, monkeypatch)
