"""The blocks against their definitions, and what they promise of single samples, of initialisation and of wrong input."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastdiff_kernels.nn import (
    Carry,
    DiTBlock,
    EDM2AttentionBlock,
    MagnitudePreservingLinear,
    MMDiTBlock,
    PixArtBlock,
    UNetAttentionBlock,
    UNetResBlock,
    axial_rope,
)
from tests.nn.cases import CASES, TEXT, TOKENS, C, M, defined, every_block, every_case, results, tensors_of


@every_case
def test_equals_its_definition_in_float64(case):
    block, inputs = case.make(), case.inputs()
    expected = defined(case, block, inputs)
    for actual, truth in zip(results(block, list(block.parameters()), inputs), expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=0, atol=1e-12 * max(1.0, truth.abs().max().item()))


def assert_as_exact_as_eager(case, parameters, stream, **autocast):
    """Largest errors against the float64 truth, averaged over inputs, since a block's are sums of roundings of either sign."""
    block, errors = case.make(parameters), []
    for seed in range(5):
        inputs = case.inputs(stream, seed)
        with torch.autocast("cpu", **autocast):
            actual, plain = results(block, list(block.parameters()), inputs), defined(case, block, inputs)
        truth = defined(case, block, inputs, torch.float64)
        roundings = [torch.finfo(stream).eps * t.abs().max() for t in truth]
        errors.append(
            [[(x.double() - t).abs().max() for x, t in zip(found, truth, strict=True)] for found in (actual, plain)] + [roundings]
        )
    ours, eager, rounding = torch.tensor(errors).mean(0)  # one number for each output and gradient
    assert (ours <= torch.maximum(2 * eager, rounding)).all(), f"ours {ours}; eager {eager}; one rounding {rounding}"
    return actual


# The slope of a clip jumps, and so do gradients where a rounding decides on which side a value lies.
@pytest.mark.parametrize("name", [name for name in CASES if name != "edm2_clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_as_exact_as_its_definition_in_training_dtypes(name, dtype):
    actual = assert_as_exact_as_eager(CASES[name], dtype, dtype, enabled=False)
    assert all(x.dtype == dtype for x in actual)


@every_block
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_keeps_the_streams_dtype(case, stream):
    actual = assert_as_exact_as_eager(case, torch.float32, stream, dtype=torch.bfloat16)
    outputs = len(tensors_of(case.make()(*case.inputs())))
    assert all(x.dtype == stream for x in actual[:outputs])


@every_block
@pytest.mark.parametrize(
    ("parameters", "stream", "autocast"),
    [(torch.bfloat16, torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16, torch.float16)],
    ids=str,
)
def test_autocast_takes_parameters_in_16_bits_too(case, parameters, stream, autocast):
    block, inputs = case.make(parameters), case.inputs(stream)
    with torch.autocast("cpu", dtype=autocast):
        outputs = tensors_of(block(*inputs))
    sum(y.double().square().sum() for y in outputs).backward()
    assert all(p.grad.dtype == parameters and p.grad.isfinite().all() for p in block.parameters())
    truth = defined(case, block, inputs, torch.float64)
    for y, expected in zip(outputs, truth, strict=False):
        assert y.dtype == stream
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=0.03 * expected.abs().max().item())


@pytest.mark.parametrize("out_channels", [8, 16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_a_residual_block_keeps_the_streams_dtype_under_autocast(out_channels, parameters, stream, autocast):
    torch.manual_seed(0)
    block = UNetResBlock(8, out_channels, 6).to(parameters)
    torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, condition = torch.randn(2, 8, 4, 4).to(stream), torch.randn(2, 6)
    with torch.autocast("cpu", dtype=autocast):
        y = block(x, condition)
    assert y.dtype == stream
    torch.testing.assert_close(y.double(), block.double()(x.double(), condition.double()), rtol=0.05, atol=0.05)


def test_checks_of_dtypes_are_no_graph_break_under_autocast():
    case = CASES["dit_rms_rope"]
    block, inputs = case.make(torch.float32), case.inputs(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = torch.compile(block, fullgraph=True, backend="eager")(*inputs), block(*inputs)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["unet", "unet_edm", "edm2"])
def test_channels_last_in_channels_last_out(name):
    block, (x,) = CASES[name].make(), CASES[name].inputs()
    y = block(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, block(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert block(x).is_contiguous()


@every_case
def test_a_sample_does_not_see_its_batch(case):
    block, inputs = case.make(), case.inputs()
    alone = tensors_of(block(*inputs))
    poisoned = tuple(
        x.index_fill(0, torch.tensor([1]), float("nan")) if len(x) == 3 and x.is_floating_point() else x
        for x in case.inputs()[: len(case.shapes)]
    )
    beside_nan = tensors_of(block(*poisoned, *inputs[len(case.shapes) :]))
    for a, b in zip(alone, beside_nan, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert b[1].isnan().any()


@every_block
def test_empty_batch(case):
    block, inputs = case.make(), case.inputs()
    empty = tuple(x[:0] if isinstance(x, torch.Tensor) else x for x in inputs)
    for y, whole in zip(tensors_of(block(*empty)), tensors_of(block(*inputs)), strict=True):
        assert y.shape == (0, *whole.shape[1:])


def test_text_behind_its_length_has_no_influence():
    block, (x, time, context, lengths) = CASES["pixart"].make(), CASES["pixart"].inputs()
    behind = torch.arange(M) >= lengths[:, None]  # [B, M]
    changed = context.masked_fill(behind[:, :, None], float("nan"))
    assert torch.equal(block(x, time, changed, lengths), block(x, time, context, lengths))
    assert not torch.equal(block(x, time, context), block(x, time, context, lengths))


def test_text_of_length_zero_adds_the_bias_alone():
    block, (x, time, context, _) = CASES["pixart"].make(), CASES["pixart"].inputs()
    nothing = block(x, time, context, torch.zeros(3, dtype=torch.int64))
    block.cross_kv.weight.data.zero_()
    block.cross_kv.bias.data.zero_()
    torch.testing.assert_close(nothing, block(x, time, context), rtol=0, atol=1e-12)


def test_dit_with_rope_depends_on_the_order_of_tokens():
    block, (x, condition) = CASES["dit"].make(), CASES["dit"].inputs()
    rope, order = axial_rope(2, 3, 8), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(block(x[:, order], condition), block(x, condition)[:, order])
    assert (block(x[:, order], condition, rope) - block(x, condition, rope)[:, order]).abs().max() > 1e-3


def test_a_carried_sum_is_the_sum():
    (first, second), (x, condition) = (CASES["dit_layer"].make(), CASES["dit"].make()), CASES["dit"].inputs()
    carried = first(x, condition, carry=True)
    assert isinstance(carried, Carry)
    torch.testing.assert_close(carried.hidden + carried.gate[:, None] * carried.branch, first(x, condition), rtol=0, atol=1e-12)
    torch.testing.assert_close(second(carried, condition), second(first(x, condition), condition), rtol=0, atol=1e-11)


def test_adaln_zero_and_zero_projections_start_as_the_identity():
    x, context, condition, image = torch.randn(TOKENS), torch.randn(TEXT), torch.randn(3, 8), torch.randn(2, C, 3, 4)
    assert torch.equal(DiTBlock(C, 2, 8)(x, condition), x)
    assert torch.equal(UNetAttentionBlock(C, num_heads=2)(image), image)
    for y, stream in zip(MMDiTBlock(C, 2, 8, qk_norm="rms")(x, context, condition), (x, context), strict=True):
        assert torch.equal(y, stream)
    pixart = PixArtBlock(C, 2)
    time = -pixart.scale_shift_table.detach().expand(3, 6, C)  # gates of zero
    assert torch.equal(pixart(x, time, context), x)


def test_edm2_preserves_magnitude():
    block, x = EDM2AttentionBlock(64, num_heads=2), torch.randn(4, 64, 6, 6)
    assert block.qkv(x.flatten(2).transpose(1, 2)).square().mean().item() == pytest.approx(1, abs=0.05)
    alone = EDM2AttentionBlock(64, num_heads=2, balance=0.0)
    torch.testing.assert_close(alone(x), x)
    assert EDM2AttentionBlock(64, clip=0.5)(x).abs().max() <= 0.5


def test_forced_weight_normalisation_changes_no_output():
    layer, x = MagnitudePreservingLinear(32, 8), torch.randn(5, 32)
    layer.weight.data.mul_(7)
    before = layer(x)
    layer.normalise()
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.weight.square().mean(1), torch.ones(8), rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    assert (gradient * layer.weight).sum(1).abs().max() < 1e-3 * gradient.norm()


@pytest.mark.parametrize("out_channels", [8, 16])
def test_unet_res_block_is_a_conditioned_residual(out_channels):
    block = UNetResBlock(8, out_channels, 6, num_groups=4).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, condition = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    scale, shift = block.modulation(F.silu(condition))[:, :, None, None].chunk(2, dim=1)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1_weight, block.norm1_bias)))
    h = block.conv2(F.silu(F.group_norm(h, 4, block.norm2_weight, block.norm2_bias) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, condition), block.skip(x) + h)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DiTBlock(10, 3, 4), ValueError, "dim must be divisible by num_heads, got dim=10 and num_heads=3"),
        (lambda: DiTBlock(8, 2, 4, qk_norm="batch"), ValueError, "qk_norm must be"),
        (lambda: DiTBlock(8, 2, 4, mlp_ratio=0.1), ValueError, "mlp_ratio must leave at least one hidden channel"),
        (lambda: DiTBlock(8, 0, 4), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: DiTBlock(8, 2, 4, policy="maybe"), ValueError, "policy must be one of 'auto', 'always', 'never', got 'maybe'"),
        (lambda: DiTBlock(1024, 2, 4), ValueError, "dim / num_heads must be at most 256, got dim=1024 and num_heads=2"),
        (lambda: PixArtBlock(10, 3), ValueError, "dim must be divisible by num_heads"),
        (lambda: PixArtBlock(8, 2, context_dim=0), ValueError, "context_dim must be at least 1, got 0"),
        (lambda: PixArtBlock(8, 2, qk_norm="pixel"), ValueError, "qk_norm must be"),
        (lambda: MMDiTBlock(8, 2, 4, qk_norm="layer"), ValueError, "qk_norm must be"),
        (lambda: MMDiTBlock(8, 2, 0), ValueError, "condition_dim must be at least 1, got 0"),
        (lambda: MMDiTBlock(8, 2, 4, context_pre_only="x"), TypeError, "context_pre_only must be a bool, got str"),
        (lambda: UNetAttentionBlock(512), ValueError, "channels / num_heads must be at most 256, got channels=512 and num_heads=1"),
        (lambda: UNetAttentionBlock(16, num_heads=3), ValueError, "channels must be divisible by num_heads"),
        (lambda: UNetAttentionBlock(16, num_groups=5), ValueError, "channels must be divisible by num_groups"),
        (lambda: UNetAttentionBlock(16, qk_norm="layer"), ValueError, "qk_norm must be"),
        (lambda: UNetAttentionBlock(16, eps=0), ValueError, "eps must be positive"),
        (lambda: UNetAttentionBlock(16, skip_scale="half"), TypeError, "skip_scale must be a number, got str"),
        (lambda: EDM2AttentionBlock(16, balance=1.5), ValueError, "balance must be finite and >= 0 and <= 1"),
        (lambda: EDM2AttentionBlock(16, clip=-1), ValueError, "clip must be positive"),
        (lambda: EDM2AttentionBlock(16, num_heads=3), ValueError, "channels must be divisible by num_heads"),
        (lambda: UNetResBlock(8, 8, 0), ValueError, "condition_dim must be at least 1, got 0"),
        (lambda: UNetResBlock(8, 12, 4), ValueError, "out_channels must be divisible by num_groups, got out_channels=12 and num_groups=8"),
    ],
)
def test_bad_sizes(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("dit", lambda x, c: (x[0], c), ValueError, r"x must have shape \[B, N, 16\], got \(6, 16\)"),
        ("dit", lambda x, c: (x, c[:2]), ValueError, r"condition must have shape \[3, 12\], got \(2, 12\)"),
        ("dit", lambda x, c: (x.float(), c), TypeError, "x must be torch.float64, the dtype of the parameters, got torch.float32"),
        ("dit", lambda x, c: (x, c.float()), TypeError, "condition must be torch.float64, the dtype of the parameters, got torch.float32"),
        ("dit", lambda x, c: (x, c, torch.ones(2, 6, 4)), TypeError, r"rope must be a pair of tensors \(cos, sin\) or None, got Tensor"),
        ("dit", lambda x, c: (x, c, (torch.ones(6, 4),)), ValueError, r"rope must be a pair of tensors \(cos, sin\), got 1 elements"),
        ("dit", lambda x, c: (x, c, (torch.ones(6, 4), None)), TypeError, r"rope must be a pair of tensors .* got a pair with a NoneType"),
        ("pixart", lambda x, t, y, n: (x, t, y.half(), n), TypeError, "context must be torch.float64, .* got torch.float16"),
        ("pixart", lambda x, t, y, n: (x[..., :8], t, y, n), ValueError, r"x must have shape \[B, N, 16\]"),
        ("pixart", lambda x, t, y, n: (x, t[:, :5], y, n), ValueError, r"time must have shape \[3, 6, 16\] or \[3, 96\], got \(3, 5, 16\)"),
        ("pixart", lambda x, t, y, n: (x, t, y[:2], n), ValueError, r"context must have shape \[3, N, 16\], got \(2, 5, 16\)"),
        ("pixart", lambda x, t, y, n: (x, t, y, n[:2]), ValueError, r"key_lengths must have shape \(3,\)"),
        ("pixart", lambda x, t, y, n: (x, t, y, n.double()), TypeError, "key_lengths must be int32 or int64"),
        ("unet", lambda x: (x[0],), ValueError, r"x must have shape \[B, 16, H, W\], got \(16, 2, 3\)"),
        ("edm2", lambda x: (x[:, :8],), ValueError, r"x must have shape \[B, 16, H, W\], got \(3, 8, 2, 3\)"),
        ("unet", lambda x: (x.float(),), TypeError, "x must be torch.float64, .* got torch.float32"),
        ("edm2", lambda x: (x.long(),), TypeError, "x must be torch.float64, .* got torch.int64"),
        ("mmdit", lambda x, y, c: (x, y, c.float()), TypeError, "condition must be torch.float64, .* got torch.float32"),
        ("mmdit", lambda x, y, c: (x[:, :, :8], y, c), ValueError, r"x must have shape \[B, N, 16\]"),
        ("mmdit", lambda x, y, c: (x, y[:1], c), ValueError, r"context must have shape \[3, N, 16\], got \(1, 5, 16\)"),
        ("mmdit", lambda x, y, c: (x, y, c[:, :4]), ValueError, r"condition must have shape \[3, 12\], got \(3, 4\)"),
    ],
)
def test_bad_input(name, change, error, message):
    with pytest.raises(error, match=message):
        CASES[name].make()(*change(*CASES[name].inputs()))


@pytest.mark.parametrize("weight", [torch.zeros(3 * C, C, dtype=torch.int8), lambda: None], ids=["int8", "method"])
def test_quantised_layers_are_not_asked_for_a_dtype(weight):
    block, (x, condition) = CASES["dit"].make(torch.float32), CASES["dit"].inputs(torch.float32)
    expected, quantised = block(x, condition), torch.nn.Identity()
    quantised.forward, quantised.in_features, quantised.weight = block.qkv.forward, C, weight
    block.qkv = quantised
    torch.testing.assert_close(block(x, condition), expected)


def test_autocast_does_not_narrow_float64():
    block, (x, condition) = CASES["dit"].make(torch.float32), CASES["dit"].inputs(torch.float32)
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"condition must be torch.float32, .* got torch.float64"):
        block(x, condition.double())


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (torch.ones(2, 5), ValueError, r"condition must have shape \[2, 6\], got \(2, 5\)"),
        (torch.ones(2, 6).double(), TypeError, "condition must be torch.float32, .* got torch.float64"),
    ],
)
def test_bad_condition_of_a_residual_block(condition, error, message):
    with pytest.raises(error, match=message):
        UNetResBlock(8, 8, 6)(torch.ones(2, 8, 4, 4), condition)
