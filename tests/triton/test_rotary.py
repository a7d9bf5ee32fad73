"""Triton kernels of the rotary family against their definitions, forward and backward."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_kernels._registry import OPS
from fastdiff_kernels.reference import rotary as definition
from fastdiff_kernels.triton import _sums, rotary
from tests.helpers import assert_bitwise, assert_within_eager
from tests.shapes import HEADS
from tests.triton import running
from tests.triton.drawing import few_examples
from tests.triton.running import check_budgets, run_interpreted

EPS = 1e-5
NORMS = ("rms", "layer", "rms_heads", "layer_heads", "pixel", None)
# Of q and of what may be float32 beside it.
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float64, torch.float64))
# Heads and their widths; and of no network.
SHAPES = {**HEADS, "none": (3, 22)}


def projection(batch, tokens, heads, width, device, layout="packed"):
    """q, k, v as parts of one projection: [B, N, 3, H, D], or tokens innermost, [B, H, D, 3, N]."""
    if layout == "packed":
        return torch.randn(batch, tokens, 3, heads, width, device=device).unbind(2)
    return [x.permute(0, 3, 1, 2) for x in torch.randn(batch, heads, width, 3, tokens, device=device).unbind(3)]


def arguments(q, k, norm, rope, dtypes=DTYPES[0], batched=False):
    """Arguments of one call of qk_norm_rope: weights where the norm has them, angles unless rope is None."""
    dtype, companion = dtypes
    batch, tokens, heads, width = q.shape
    size = heads * width if norm and norm.endswith("_heads") else width
    weights = [torch.randn(size, device=q.device).to(companion) for _ in range(2)] if norm in NORMS[:4] else [None, None]
    angle = torch.randn(*((batch, tokens) if batched else (tokens,)), width // 2, device=q.device)
    angles = [None, None] if rope is None else [angle.cos().to(companion), angle.sin().to(companion)]
    return (q.to(dtype), k.to(dtype), *weights, *angles, norm, rope or "half", EPS)


def defined(name, args, upstream, differentiable, dtype=None):
    """Outputs and gradients of the definition, with every tensor in dtype or, for None, as it is."""
    given = [a.detach().to(dtype or a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
    leaves = [a.requires_grad_() for a in given[:differentiable] if a is not None]
    outputs = several(getattr(definition, name)(*given))
    grads = torch.autograd.grad(outputs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])
    return [*(o.detach() for o in outputs), *grads]


def launched(name, args, upstream, differentiable, extra=()):
    """Outputs and gradients of the kernels."""
    outputs = several(getattr(rotary, name)(*args))
    needs = [a is not None for a in args[:differentiable]]
    grads = several(getattr(rotary, f"{name}_backward")(*upstream, *args, [*needs, *extra]))
    assert all(g.numel() == 0 for g, need in zip(grads, (*needs, *extra), strict=True) if not need)
    return [*outputs, *(g for g, need in zip(grads, (*needs, *extra), strict=True) if need)]


def several(result):
    return (result,) if isinstance(result, torch.Tensor) else result


def upstream_of(tensors):
    return [torch.randn(x.shape, device=x.device).to(x.dtype) for x in tensors]


def check(args, name="qk_norm_rope", differentiable=4, extra=(False, False)):
    """Outputs and gradients are contiguous and as near the float64 truth as the definition's in the same dtype."""
    upstream = upstream_of(args[: {"qk_norm_rope": 2, "qkv_pixel_norm": 3, "pixel_norm": 1}[name]])
    results = (
        launched(name, args, upstream, differentiable, extra),
        defined(name, args, upstream, differentiable),
        defined(name, args, upstream, differentiable, torch.float64),
    )
    for actual, eager, truth in zip(*results, strict=True):
        assert actual.dtype == eager.dtype
        assert actual.is_contiguous()
        if actual.dtype == torch.float64:
            torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)
        else:
            assert_within_eager(actual, eager, truth, factor=4.0)


@pytest.mark.executes
@pytest.mark.parametrize("rope", ["interleaved", "half", None])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_with_every_rotation(norm, rope, device):
    q, k, _ = projection(2, 3, 3, 12, device)
    check(arguments(q, k, norm, rope))
    check(arguments(q, k, norm, rope, DTYPES[3], batched=True))


@pytest.mark.executes
@pytest.mark.parametrize(("index", "shape"), list(enumerate(SHAPES.values())), ids=SHAPES)
def test_heads_of_networks(index, shape, device):
    q, k, _ = projection(1, 2, *shape, device)
    rope = ("interleaved", "half", None)[index % 3]
    for norm in (NORMS[index % 2], NORMS[2 + index % 2]):
        check(arguments(q, k, norm, rope, DTYPES[index % 3]))


@pytest.mark.executes
@pytest.mark.parametrize("norm", ["layer", "rms_heads", None])
def test_lengths_differ_and_widths_are_odd_without_rotation(norm, device):
    q, k, _ = projection(2, 5, 3, 7, device)
    check(arguments(q, k[:, :3], norm, None))
    check(arguments(q[:, :2], k, norm, None))


@pytest.mark.executes
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["packed", "tokens innermost"])
def test_projections_are_read_in_place(layout, norm, device):
    tokens = 3 if norm and norm.endswith("_heads") else 37
    q, k, _ = projection(2, tokens, 2, 24, device, layout)
    args = arguments(q, k, norm, "interleaved")
    assert [x.stride() for x in args[:2]] == [q.stride(), k.stride()]
    dense = (*(x.contiguous() for x in args[:2]), *args[2:])
    upstream = upstream_of(args[:2])
    turned = [u.transpose(1, 3).contiguous().transpose(1, 3) for u in upstream]
    found = launched("qk_norm_rope", args, turned, 4, (False, False))
    expected = launched("qk_norm_rope", dense, upstream, 4, (False, False))
    # Weights' gradients are summed in the order of the tiles, which follows the layout.
    assert_bitwise(found[:4], expected[:4])
    torch.testing.assert_close(found[4:], expected[4:])


@pytest.mark.executes
def test_operands_of_any_strides(device):
    q, k, _ = projection(2, 5, 2, 16, device)
    args = list(arguments(q, k, "rms", "half"))
    expected = rotary.qk_norm_rope(*args)
    args[0] = torch.stack([q, q], -1)[..., 0]
    args[2] = torch.stack([args[2], args[2]], -1)[:, 0]
    args[4:6] = [torch.stack([t, t], -1)[..., 0] for t in args[4:6]]
    assert_bitwise(rotary.qk_norm_rope(*args), expected)
    ones = torch.ones_like(q)
    expanded = torch.ones((), device=device).expand(q.shape)
    needs = [True, True, True, True, False, False]
    assert_bitwise(rotary.qk_norm_rope_backward(expanded, expanded, *args, needs), rotary.qk_norm_rope_backward(ones, ones, *args, needs))


@pytest.mark.executes
@pytest.mark.parametrize("layout", ["packed", "tokens innermost"])
@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 33, 2, 64), torch.bfloat16), ((1, 4, 1, 256), torch.float32), ((2, 3, 2, 7), torch.float64)]
)
def test_pixel_norm_of_queries_keys_and_values(shape, dtype, layout, device):
    q, k, v = (x.to(dtype) for x in projection(*shape, device, layout))
    check((q, k, v, EPS), "qkv_pixel_norm", 3, ())
    check((q, k[:, :3], v[:, :3], EPS), "qkv_pixel_norm", 3, ())
    check((q, EPS), "pixel_norm", 1, ())


@pytest.mark.executes
def test_pixel_norm_of_zeros_has_a_slope(device):
    zero, one = torch.zeros(1, 1, 1, 8, device=device), torch.ones(1, 1, 1, 8, device=device)
    grads = rotary.qkv_pixel_norm_backward(one, one, one, zero, zero, zero, 0.125, [True] * 3)
    assert_bitwise(grads, [8 * one] * 3)


@pytest.mark.executes
def test_gradients_that_nobody_asked_for_change_nothing(device):
    q, k, v = projection(2, 9, 2, 16, device)
    args, upstream = arguments(q, k, "layer", "half"), upstream_of((q, k, v))
    everything = rotary.qk_norm_rope_backward(*upstream[:2], *args, [True] * 4 + [False] * 2)
    for i in range(4):
        alone = rotary.qk_norm_rope_backward(*upstream[:2], *args, [j == i for j in range(6)])
        assert_bitwise(alone[i], everything[i])
        assert all(g.numel() == 0 for j, g in enumerate(alone) if j != i)
    alone = rotary.qkv_pixel_norm_backward(*upstream, q, k, v, EPS, [False, False, True])
    assert_bitwise(alone[2], rotary.qkv_pixel_norm_backward(*upstream, q, k, v, EPS, [True] * 3)[2])


@pytest.mark.executes
@pytest.mark.parametrize("norm", ["rms", "rms_heads"])
def test_long_sums_are_added_in_stages(norm, device, monkeypatch):
    monkeypatch.setattr(_sums, "ROWS_PER_CHUNK", 2)
    monkeypatch.setattr(rotary, "_PROGRAMS", 3)
    monkeypatch.setattr(rotary, "_TILE", 64)
    q, k, _ = projection(2, 9, 2, 8, device)
    check(arguments(q, k, norm, "half"))


@pytest.mark.executes
@pytest.mark.parametrize("norm", ["rms", "layer_heads"])
def test_a_samples_result_does_not_depend_on_its_batch(norm, device):
    q, k, _ = projection(3, 3, 3, 24, device)
    args, upstream = arguments(q, k, norm, "interleaved"), upstream_of((q, k))
    part = (q[1:2], k[1:2], *args[2:])
    whole = launched("qk_norm_rope", args, upstream, 4, (False, False))[:4]
    alone = launched("qk_norm_rope", part, [u[1:2] for u in upstream], 4, (False, False))[:4]
    assert_bitwise(alone, [w[1:2] for w in whole])


@pytest.mark.executes
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_rows(shape, device):
    q, k, v = projection(*shape, 2, 8, device)
    for norm in ("rms", "layer_heads"):
        args = arguments(q, k, norm, "half")
        found = launched("qk_norm_rope", args, upstream_of((q, k)), 4, (False, False))
        assert [f.shape for f in found] == [a.shape for a in (q, k, *args[:4])]
        assert not any(f.any() for f in found)
    assert all(o.shape == q.shape for o in rotary.qkv_pixel_norm(q, k, v, EPS))


def test_refuses_float64_tokens_that_its_registers_do_not_hold():
    refuses = OPS["qk_norm_rope"].refuses

    def reason(heads, norm, dtype=torch.float64):
        q = torch.empty(1, 1, heads, 128, dtype=dtype)
        return refuses("triton", q, q, None, None, None, None, norm, "half", EPS)

    assert reason(32, "layer_heads") is None
    assert "at most 4096 channels, powers of two by heads, of a token in float64; there are 8192" in reason(33, "rms_heads")
    assert reason(33, "rms") is None
    assert reason(33, "rms_heads", torch.float32) is None


@pytest.mark.executes
@few_examples
@given(
    norm=st.sampled_from(NORMS),
    rope=st.sampled_from(["interleaved", "half", None]),
    shape=st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(1, 4), st.integers(1, 20).map(lambda half: 2 * half)),
    batched=st.booleans(),
    layout=st.sampled_from(["packed", "tokens innermost"]),
)
def test_any_shape(norm, rope, shape, batched, layout, device):
    q, k, _ = projection(*shape, device, layout)
    check(arguments(q, k, norm, rope, DTYPES[3], batched))


def test_in_the_interpreter():
    run_interpreted(__file__)


def both_ways(norm, rope, dtype, heads, width, layout="packed"):
    """A call that launches forward and backward."""

    def call():
        q, k, v = (x.to(dtype) for x in projection(1, 64, heads, width, "cpu", layout))
        if norm == "pixel":
            launched("qkv_pixel_norm", (q, k, v, EPS), upstream_of((q, k, v)), 3)
            launched("pixel_norm", (q, EPS), upstream_of((q,)), 1)
        else:
            args = arguments(q, k, norm, rope, (dtype, torch.float32))
            launched("qk_norm_rope", args, upstream_of((q, k)), 4, (False, False))

    return call


CASES = {
    "DiT": both_ways("rms", None, torch.bfloat16, 16, 72),
    "Flux": both_ways("rms", "interleaved", torch.bfloat16, 24, 128),
    "half": both_ways("layer", "half", torch.float16, 16, 72),
    "Wan": both_ways("rms_heads", "interleaved", torch.bfloat16, 40, 128),
    "EDM": both_ways("pixel", None, torch.float32, 1, 256, "tokens innermost"),
    "EDM2": both_ways("pixel", None, torch.bfloat16, 8, 64, "tokens innermost"),
}


def test_stays_within_budgets(monkeypatch):
    check_budgets("rotary", CASES, monkeypatch)


@pytest.mark.parametrize("case", CASES)
def test_reads_and_writes_by_sixteen_bytes(case, monkeypatch):
    """Nothing of the size of q moves in pieces smaller than a vector; float32 weights may, once a program."""
    for kernel, args, options in recorded(CASES[case], monkeypatch):
        with mock.patch.object(triton.runtime.driver, "_active", running._NoDriver(90)):
            ptx = kernel.warmup(*args, grid=(1,), **options).asm["ptx"]
        sixteen = {"b16": r"v[48]\.b16", "b32": r"v4\.b32"}
        narrow = [m for m in re.findall(r"(?:ld|st)\.global(?:\.[\w:]+)*", ptx) if m.rsplit(".", 1)[1] in sixteen]
        assert any(re.search(r"v4\.b32", m) for m in narrow)
        assert not any(m.endswith("b16") for m in narrow), kernel


def recorded(call, monkeypatch):
    launches = []

    def record(kernel, _programs, *args, num_warps=4, enable_fp_fusion=True, **constants):
        launches.append((kernel, args, {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion, **constants}))

    monkeypatch.setattr(rotary, "launch", record)
    monkeypatch.setattr(_sums, "launch", record)
    call()
    return [launch for launch in launches if launch[0] is not _sums._add_rows_kernel]
