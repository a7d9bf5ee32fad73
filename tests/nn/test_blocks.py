"""The blocks against plain PyTorch, and what they promise at initialisation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastdiff_kernels.nn import DiTBlock, UNetAttentionBlock, UNetResBlock, axial_rope


def randomised(module, dtype=torch.float64):
    """With every parameter random, so that zero-initialised branches count."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def plain_attention(q, k, v):
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def test_dit_block_starts_as_the_identity():
    x = torch.randn(2, 5, 16)
    assert torch.equal(DiTBlock(16, 2, 8)(x, torch.randn(2, 8)), x)


@pytest.mark.parametrize("qk_norm", [None, "rms", "layer"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_dit_block_is_adaln_zero(qk_norm, tokens):
    block = randomised(DiTBlock(16, 2, 8, qk_norm=qk_norm))
    x, condition = torch.randn(3, tokens, 16, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation(F.silu(condition))[:, None].chunk(6, dim=2)
    q, k, v = block.qkv(F.layer_norm(x, (16,), eps=1e-6) * (1 + scale_a) + shift_a).view(3, tokens, 3, 2, 8).unbind(2)
    if qk_norm == "rms":
        q, k = F.rms_norm(q, (8,), block.q_weight, 1e-6), F.rms_norm(k, (8,), block.k_weight, 1e-6)
    elif qk_norm == "layer":
        q, k = F.layer_norm(q, (8,), block.q_weight, eps=1e-6), F.layer_norm(k, (8,), block.k_weight, eps=1e-6)
    expected = x + gate_a * block.attention_out(plain_attention(q, k, v).reshape(3, tokens, 16))
    expected = expected + gate_m * block.mlp(F.layer_norm(expected, (16,), eps=1e-6) * (1 + scale_m) + shift_m)
    torch.testing.assert_close(block(x, condition), expected)


def test_dit_block_with_rope_depends_on_the_order_of_tokens():
    block, rope = randomised(DiTBlock(16, 2, 8)), axial_rope(2, 3, 8)
    x, condition, order = torch.randn(1, 6, 16, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(block(x[:, order], condition), block(x, condition)[:, order])
    assert (block(x[:, order], condition, rope) - block(x, condition, rope)[:, order]).abs().max() > 1e-3


def test_unet_attention_block_starts_as_the_identity():
    x = torch.randn(2, 16, 3, 4)
    assert torch.equal(UNetAttentionBlock(16, num_heads=2)(x), x)


@pytest.mark.parametrize("qk_norm", [None, "rms"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_unet_attention_block_is_attention_over_pixels(qk_norm, channels_last):
    block = randomised(UNetAttentionBlock(16, num_heads=2, num_groups=4, qk_norm=qk_norm))
    x = torch.randn(2, 16, 3, 4, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    h = F.group_norm(x, 4, block.norm_weight, block.norm_bias).flatten(2).transpose(1, 2)
    q, k, v = block.qkv(h).view(2, 12, 3, 2, 8).unbind(2)
    if qk_norm:
        q, k = F.rms_norm(q, (8,), block.q_weight, 1e-6), F.rms_norm(k, (8,), block.k_weight, 1e-6)
    expected = x + block.out(plain_attention(q, k, v).reshape(2, 12, 16)).transpose(1, 2).reshape(2, 16, 3, 4)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("out_channels", [8, 16])
def test_unet_res_block_is_a_conditioned_residual(out_channels):
    block = randomised(UNetResBlock(8, out_channels, 6, num_groups=4))
    x, condition = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    scale, shift = block.modulation(F.silu(condition))[:, :, None, None].chunk(2, dim=1)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1_weight, block.norm1_bias)))
    h = block.conv2(F.silu(F.group_norm(h, 4, block.norm2_weight, block.norm2_bias) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, condition), block.skip(x) + h)


@pytest.mark.parametrize(
    ("block", "inputs"),
    [
        (DiTBlock(16, 2, 8, qk_norm="rms"), (torch.randn(2, 5, 16), torch.randn(2, 8))),
        (UNetAttentionBlock(16, num_heads=2), (torch.randn(2, 16, 3, 3),)),
        (UNetResBlock(8, 16, 6), (torch.randn(2, 8, 4, 4), torch.randn(2, 6))),
    ],
    ids=["dit", "attention", "res"],
)
def test_blocks_keep_the_streams_dtype_under_autocast(block, inputs):
    block = randomised(block, torch.float32)
    expected = block(*inputs)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            found = block(inputs[0].to(dtype), *inputs[1:])
        assert found.isfinite().all()
        assert dtype == torch.bfloat16 or isinstance(block, UNetResBlock) or found.dtype == torch.float32
        assert (found.float() - expected).norm() < 0.1 * expected.norm()


def test_dit_block_compiles():
    block = randomised(DiTBlock(16, 2, 8, qk_norm="rms"), torch.float32)
    x, condition = torch.randn(2, 5, 16), torch.randn(2, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, condition, axial_rope(1, 5, 8)), block(x, condition, axial_rope(1, 5, 8)))
    found = torch.autograd.grad(compiled(x, condition).square().sum(), list(block.parameters()))
    expected = torch.autograd.grad(block(x, condition).square().sum(), list(block.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiTBlock(10, 3, 4), "dim must be divisible by num_heads, got dim=10 and num_heads=3"),
        (lambda: DiTBlock(8, 2, 4, qk_norm="batch"), "qk_norm must be"),
        (lambda: DiTBlock(8, 2, 4, mlp_ratio=0.1), "mlp_ratio must leave at least one hidden channel"),
        (lambda: DiTBlock(8, 0, 4), "num_heads must be at least 1, got 0"),
        (lambda: UNetAttentionBlock(16, num_heads=3), "channels must be divisible by num_heads"),
        (lambda: UNetAttentionBlock(16, num_groups=5), "channels must be divisible by num_groups"),
        (lambda: UNetAttentionBlock(16, qk_norm="layer"), "qk_norm must be"),
        (lambda: UNetResBlock(8, 12, 4), "out_channels must be divisible by num_groups, got out_channels=12 and num_groups=8"),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()
