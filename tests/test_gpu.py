"""What every GPU kernel owes, once over the whole table: parity with the definition, repeatability, graphs, streams, sizes beyond 2^31."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

import fastdiff_kernels
from fastdiff_kernels import _backends, ops
from fastdiff_kernels._registry import OPS, Op, overload

from .helpers import outputs_of

pytestmark = pytest.mark.gpu

FAMILIES = sorted({op.family for op in OPS.values()})
SAMPLES = {name: make for family in FAMILIES for name, make in importlib.import_module(f"tests.samples.{family}").SAMPLES.items()}
CALLS = [
    pytest.param(op, index, backend, id=f"{name}-{index}-{backend}")
    for name, op in OPS.items()
    for index in range(len(SAMPLES[name](torch.float32, "cpu")))
    for backend in op.kernels
    if backend != "cpu"
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(op: Op, index: int, dtype: torch.dtype, backend: str) -> tuple[list, list[int]]:
    """A sample's arguments on the GPU, leaves that require grad among them, and the places of those; skips what the backend refuses."""
    args = list(SAMPLES[op.name](dtype, "cuda")[index])
    if (reason := _backends.refusal(op, backend, args)) is not None:
        pytest.skip(reason)
    places = [i for i, name in enumerate(op.arguments) if name in op.differentiable and isinstance(args[i], Tensor)]
    return [a.detach().requires_grad_() if i in places else a for i, a in enumerate(args)], places


def results(op: Op, args: list, places: list[int]) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = outputs_of(overload(op).default(*args))
    if not places:
        return list(outputs)
    total = [outputs[i].float().sin().sum() for i in op.primary]
    return [*outputs, *torch.autograd.grad(total, [args[i] for i in places], materialize_grads=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "index", "backend"), CALLS)
def test_as_near_the_truth_as_the_definition(op: Op, index: int, backend: str, dtype: torch.dtype):
    args, places = call(op, index, dtype, backend)
    wide = [a.detach().double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    wide = [a.requires_grad_() if i in places else a for i, a in enumerate(wide)]
    with fastdiff_kernels.backend("reference"):
        exact, definition = results(op, wide, places), results(op, args, places)
    with fastdiff_kernels.backend(backend):
        found = results(op, args, places)
    for f, d, e in zip(found, definition, exact, strict=True):
        error, allowed = ((t.double() - e.double()).abs().max().item() if t.numel() else 0 for t in (f, d))
        rounding = torch.finfo(dtype).eps * e.double().abs().max().item() if e.numel() else 0
        assert error <= max(2 * allowed, 2 * rounding)


@pytest.mark.parametrize(("op", "index", "backend"), CALLS)
def test_two_runs_agree_bitwise(op: Op, index: int, backend: str):
    args, places = call(op, index, torch.bfloat16, backend)
    with fastdiff_kernels.backend(backend):
        for first, second in zip(results(op, args, places), results(op, args, places), strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("op", "index", "backend"), CALLS)
def test_a_captured_graph_replays_with_new_values(op: Op, index: int, backend: str):
    args, _ = call(op, index, torch.float32, backend)
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    with fastdiff_kernels.backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            overload(op).default(*args)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs_of(overload(op).default(*args))
        for a in args:
            if isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 1:
                a.mul_(1.25)
        graph.replay()
        for c, fresh in zip(captured, outputs_of(overload(op).default(*args)), strict=True):
            torch.testing.assert_close(c, fresh, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("op", "index", "backend"), CALLS)
def test_runs_on_the_current_stream_and_waits_for_nothing(op: Op, index: int, backend: str):
    args, _ = call(op, index, torch.float32, backend)
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    with fastdiff_kernels.backend(backend):
        expected = outputs_of(overload(op).default(*args))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(side):
                found = outputs_of(overload(op).default(*args))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(side)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["layer_norm_modulate", "group_norm_silu", "lcss_loss"])
def test_more_than_two_to_the_31_elements(name: str):
    """The last rows of a tensor whose offsets do not fit 32 bits equal the same rows alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    rows, width = (1 << 31) // 4096 + 8, 4096
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    if name == "layer_norm_modulate":
        shift, scale = torch.randn(2, width, device="cuda", dtype=torch.bfloat16)
        whole, tail = (ops.layer_norm_modulate(t[None], shift, scale)[0, -8:] for t in (x, x[-8:]))
    elif name == "group_norm_silu":
        whole, tail = (ops.group_norm_silu(t.view(-1, 64, 64), 8, None, None)[-8:] for t in (x, x[-8:]))
    else:
        noise = x.flip(0)
        whole, tail = ops.lcss_loss(x, noise, 0.5)[-8:], ops.lcss_loss(x[-8:], noise[-8:], 0.5)
    assert torch.equal(whole, tail)
