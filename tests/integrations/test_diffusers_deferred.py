"""Modulation, gates and residuals that a block writes out: one op each where it says what is known, and its own arithmetic elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff_kernels.integrations.diffusers import _deferred as deferred
from fastdiff_kernels.integrations.diffusers import _probes as probes
from fastdiff_kernels.integrations.diffusers import patch
from tests.helpers import assert_bitwise, assert_within_eager
from tests.integrations.models import BY_NAME, CASES, Case, randn

BLOCKS = [case for case in CASES if "LayerNorm" in case.counts or "FP32LayerNorm" in case.counts]


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def norm() -> nn.LayerNorm:
    module = nn.LayerNorm(8, elementwise_affine=False, eps=1e-6)
    module.__class__ = deferred.FusedLayerNorm
    return module


def feed_forward() -> FeedForward:
    torch.manual_seed(0)
    module = FeedForward(8)
    module.__class__ = deferred.GatedFeedForward
    return module


X, SHIFT, SCALE, STREAM = randn(2, 3, 8), randn(2, 1, 8, seed=2), randn(2, 1, 8, seed=3), randn(2, 3, 8, seed=4)


def ran(fn: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    with Calls() as calls:
        output = fn()
    return output, [name for name in calls.names if name.startswith("fastdiff::")]


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_every_modulation_gate_and_residual_of_the_blocks_is_an_op(case: Case) -> None:
    model = case.model()
    patch(model)
    computed = deferred.Deferred.computed
    _, names = ran(lambda: case.call(model))
    norms = sum(isinstance(m, (deferred.FusedLayerNorm, deferred.FusedFP32LayerNorm)) for m in model.modules())
    modulated = sum(count for kind, count in case.counts.items() if "Ada" in kind) + case.counts.get("SD35AdaLayerNormZeroX", 0)
    assert names.count("fastdiff::layer_norm_modulate") == norms + modulated
    gates = {
        "DiTTransformer2DModel": 4,
        "PixArtTransformer2DModel": 4,
        "SD3Transformer2DModel": 6,
        "SD3Transformer2DModel-3.5": 7,
        "FluxTransformer2DModel": 6,
        "WanTransformer3DModel": 4,
    }
    assert names.count("fastdiff::gate_residual") == gates[case.name]
    assert deferred.Deferred.computed == computed


@pytest.mark.parametrize("scale", [SCALE, randn(2, 3, 8, seed=3)], ids=["sample", "token"])
def test_a_norm_scaled_and_shifted_is_one_op(scale: Tensor) -> None:
    output, names = ran(lambda: norm()(X) * (1 + scale) + SHIFT)
    assert names == ["fastdiff::layer_norm_modulate"]
    torch.testing.assert_close(output, nn.functional.layer_norm(X, (8,), eps=1e-6) * (1 + scale) + SHIFT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_scale_is_recovered_without_rounding(dtype: torch.dtype) -> None:
    scale = torch.cat([(randn(1 << 16) * 10.0**e).to(dtype) for e in range(-6, 2)])
    factor = 1 + scale
    assert_bitwise((factor - 1).double() + 1, factor.double())


@pytest.mark.parametrize("written", [lambda r, b, g: r + g * b, lambda r, b, g: b * g + r], ids=["residual first", "branch first"])
def test_a_gated_branch_on_a_residual_is_one_op(written: Callable) -> None:
    module = feed_forward()
    output, names = ran(lambda: written(STREAM, module(X), SCALE))
    assert names == ["fastdiff::gate_residual"]
    torch.testing.assert_close(output, STREAM + SCALE * FeedForward.forward(module, X))


@pytest.mark.parametrize(
    "elsewhere",
    [
        lambda y: y + 1,
        lambda y: 1 - y,
        lambda y: y * SCALE * SCALE,
        lambda y: y * SCALE - SHIFT,
        lambda y: y * randn(8),
        lambda y: (y * SCALE).sum(1),
        lambda y: torch.cat([y, y * SCALE], 1),
        lambda y: nn.functional.linear(y, randn(4, 8)),
        lambda y: y[:, 1:] / 2,
        lambda y: torch.add(y * SCALE, STREAM, alpha=2),
        lambda y: y * SCALE.double() + SHIFT,
        lambda y: -y.transpose(1, 2),
        lambda y: torch.stack([row for row in y]),  # noqa: C416
        lambda y: y * y + y,
    ],
)
def test_anything_else_is_done_with_the_tensor(elsewhere: Callable) -> None:
    for module, plain in ((norm(), nn.LayerNorm.forward), (feed_forward(), FeedForward.forward)):
        output, names = ran(lambda module=module: elsewhere(module(X)))
        assert names == []
        assert_bitwise(output, elsewhere(plain(module, X)))


def test_who_looks_at_a_module_sees_a_tensor() -> None:
    module, seen = norm(), []
    module.register_forward_hook(lambda *args: seen.append(args[2]))
    assert type(module(X)) is Tensor
    assert type(seen[0]) is Tensor
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert type(feed_forward()(X)) is Tensor
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert type(norm()(X)) is Tensor
    finally:
        handle.remove()


def test_shapes_are_inferred_on_the_meta_device() -> None:
    x, scale, gate = (t.to("meta") for t in (X, SCALE, SCALE))
    output = x + feed_forward().to("meta")(norm()(x) * (1 + scale) + scale) * gate
    assert output.shape == X.shape
    assert output.device.type == "meta"


def test_a_mode_over_torchs_functions_sees_the_op() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        output = norm()(X) * (1 + SCALE) + SHIFT
    torch.testing.assert_close(output, nn.functional.layer_norm(X, (8,), eps=1e-6) * (1 + SCALE) + SHIFT)


def test_a_block_that_is_written_otherwise_keeps_its_norms(monkeypatch) -> None:
    forward = BasicTransformerBlock.forward

    class Clamped(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x).clamp(-9, 9)

    def clamped(self, hidden_states, *args, **kwargs):
        before = self.norm3
        self.norm3 = Clamped(before)
        try:
            return forward(self, hidden_states, *args, **kwargs)
        finally:
            self.norm3 = before

    probes.difference.cache_clear()
    monkeypatch.setattr(BasicTransformerBlock, "forward", clamped)
    try:
        case = BY_NAME["DiTTransformer2DModel"]
        model = copy.deepcopy(case.model())
        before = case.call(model)
        report = patch(model)
        assert report.counts == {"AdaLayerNormZero": 2, "AttnProcessor2_0": 2}
        assert "does something else between its modules than the one known here" in repr(report)
        torch.testing.assert_close(case.call(model), before)
    finally:
        probes.difference.cache_clear()


def test_chunked_feed_forward_and_bfloat16_streams_are_the_hosts() -> None:
    case = BY_NAME["WanTransformer3DModel"]
    model = case.model()
    exact = copy.deepcopy(model).double()
    low = copy.deepcopy(model).to(torch.bfloat16)
    before, truth = case.call(low, torch.bfloat16), case.call(exact, torch.float64)
    patch(low)
    assert_within_eager(case.call(low, torch.bfloat16), before, truth)
    basic = BY_NAME["DiTTransformer2DModel"]
    model = basic.model()
    before = basic.call(model)
    patch(model)
    for block in model.transformer_blocks:
        block.set_chunk_feed_forward(4, 1)
    torch.testing.assert_close(basic.call(model), before)


def test_the_tensor_it_stands_for_is_computed_once_and_can_be_pickled() -> None:
    waiting = norm()(X)
    computed = deferred.Deferred.computed
    first, second = waiting.tensor(), waiting.tensor()
    assert first is second
    assert deferred.Deferred.computed == computed + 1
    assert waiting.shape == X.shape
    assert len(waiting) == 2
    assert_bitwise(pickle.loads(pickle.dumps(waiting.tensor())), first)
