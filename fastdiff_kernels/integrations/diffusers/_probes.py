"""Each replacement against the installed diffusers on a tiny module, before it is used.

A release that computes something else than the one written against is thereby left alone, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers.models import normalization as host
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from .. import _swap
from .._policy import everywhere
from . import _blocks, _norms, _processors, _resnet
from ._deferred import Deferred

# Far above rounding in float32, far below any change of a formula at these random weights.
_TOLERANCE = 1e-4


@cache
def difference(replaced: Any) -> str | None:
    """Why nothing of the class `replaced` (a layer, a block, a processor) may be replaced here, or None."""
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        try:
            cases = _CASES[replaced]()
        except (TypeError, AttributeError) as error:
            return f"diffusers' {replaced.__name__} is built otherwise than known here: {error}"
        for module, replace, args, kwargs in cases:
            _randomise(module)
            before = _flat(module(*args, **kwargs))
            replace(module)
            waited = Deferred.computed
            with everywhere():
                after = _flat(module(*args, **kwargs))
            if Deferred.computed != waited:
                return f"this version's {replaced.__name__} does something else between its modules than the one known here"
            if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
                return f"this version's {replaced.__name__} returns other tensors than the one known here"
            largest = max((a - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in zip(after, before, strict=True))
            if not largest <= _TOLERANCE:
                return f"this version's {replaced.__name__} computes something else than the one known here (difference {largest:.1e})"
    return None


_Case = tuple[nn.Module, Callable[[nn.Module], object], tuple, dict]


def _norm_case(build: Callable[[], nn.Module], *extra: tuple[int, ...]) -> Callable[[], list[_Case]]:
    def cases() -> list[_Case]:
        module = build().float()
        args = (_randn(2, 3, 8), *(_randn(*shape) for shape in extra))
        if isinstance(module, host.AdaLayerNormZero):
            return [(module, _swap_norms, args[:1], {"emb": args[1]})]
        return [(module, _swap_norms, args, {})]

    return cases


def _resnet_cases() -> list[_Case]:
    def build(**options: Any) -> nn.Module:
        return ResnetBlock2D(in_channels=4, out_channels=8, temb_channels=6, groups=2, **options).float()

    args = _randn(2, 4, 4, 4), _randn(2, 6)
    kinds: list[dict] = [{}, {"time_embedding_norm": "scale_shift"}, {"up": True}, {"down": True}]
    return [(build(**kind), swap_resnet, args, {}) for kind in kinds]


def _output_cases(build: Callable[..., nn.Module], *extra: Tensor) -> Callable[[], list[_Case]]:
    def cases() -> list[_Case]:
        model = build(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            block_out_channels=(4,),
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            **({"attention_head_dim": 2, "add_attention": False} if not extra else {"mid_block_type": None, "cross_attention_dim": 4}),
        )
        args = (_randn(2, 2, 4, 4), torch.tensor([3, 700]), *extra)
        return [(model.float(), swap_output, args, {"return_dict": False})]

    return cases


def _attention_cases() -> list[_Case]:
    spatial = Attention(8, heads=2, dim_head=4, norm_num_groups=2, bias=True, residual_connection=True, rescale_output_factor=2.0)
    cross = Attention(8, cross_attention_dim=6, heads=2, dim_head=4, cross_attention_norm="layer_norm", qk_norm="layer_norm")
    mask = torch.tensor([[[0.0, 0, 0, 0, 0]], [[0.0, 0, -10000, -10000, -10000]]])  # [B, 1, M]
    return [
        (spatial, _swap_processor, (_randn(2, 8, 3, 3),), {}),
        (cross, _swap_processor, (_randn(2, 4, 8), _randn(2, 5, 6), mask), {}),
    ]


def _joint_cases() -> list[_Case]:
    processor = _processors.JointAttnProcessor2_0()
    joint = Attention(
        8,
        added_kv_proj_dim=8,
        heads=2,
        dim_head=4,
        bias=True,
        context_pre_only=False,
        qk_norm="rms_norm",
        processor=processor,
    )
    return [(joint, _swap_processor, (_randn(2, 4, 8), _randn(2, 3, 8)), {})]


def _flux_cases() -> list[_Case]:
    double = FluxAttention(8, heads=2, dim_head=4, out_dim=8, added_kv_proj_dim=8, context_pre_only=False, bias=True)
    single = FluxAttention(8, heads=2, dim_head=4, out_dim=8, pre_only=True, bias=True)
    angles = _randn(7, 2).repeat_interleave(2, dim=1)
    rotary = {"image_rotary_emb": (angles.cos(), angles.sin())}
    return [(double, _swap_processor, (_randn(2, 4, 8), _randn(2, 3, 8)), rotary), (single, _swap_processor, (_randn(2, 7, 8),), rotary)]


def _wan_cases() -> list[_Case]:
    alone, cross = WanAttention(8, heads=2, dim_head=4), WanAttention(8, heads=2, dim_head=4, cross_attention_dim_head=4)
    angles = _randn(1, 5, 1, 2).repeat_interleave(2, dim=3)
    for module in (alone, cross):
        module.set_processor(_processors.WanAttnProcessor())
    return [
        (alone, _swap_processor, (_randn(2, 5, 8), None, None, (angles.cos(), angles.sin())), {}),
        (cross, _swap_processor, (_randn(2, 5, 8), _randn(2, 3, 8)), {}),
    ]


def _basic_block_cases() -> list[_Case]:
    options: dict = {"attention_bias": True, "norm_elementwise_affine": False}
    zero = BasicTransformerBlock(8, 2, 4, norm_type="ada_norm_zero", num_embeds_ada_norm=10, **options).eval()
    single = BasicTransformerBlock(8, 2, 4, norm_type="ada_norm_single", cross_attention_dim=8, **options)
    x, labels = _randn(2, 4, 8), torch.tensor([3, 7])
    return [
        (zero, _swap_block, (x,), {"timestep": labels, "class_labels": labels}),
        (single, _swap_block, (x,), {"timestep": _randn(2, 48), "encoder_hidden_states": _randn(2, 3, 8)}),
    ]


def _joint_block_cases() -> list[_Case]:
    args = _randn(2, 4, 8), _randn(2, 3, 8), _randn(2, 8)
    kinds: list[dict] = [{"use_dual_attention": True, "qk_norm": "rms_norm"}, {}]
    return [(JointTransformerBlock(8, 2, 4, **kind), _swap_block, args, {}) for kind in kinds]


def _flux_block_cases() -> list[_Case]:
    return [(FluxTransformerBlock(8, 2, 4), _swap_block, (_randn(2, 4, 8), _randn(2, 3, 8), _randn(2, 8)), {})]


def _flux_single_block_cases() -> list[_Case]:
    return [(FluxSingleTransformerBlock(8, 2, 4), _swap_block, (_randn(2, 4, 8), _randn(2, 3, 8), _randn(2, 8)), {})]


def _wan_block_cases() -> list[_Case]:
    block = WanTransformerBlock(dim=8, ffn_dim=12, num_heads=2, cross_attn_norm=True)
    angles = _randn(1, 5, 1, 2).repeat_interleave(2, dim=3)
    rest = _randn(2, 3, 8), _randn(2, 6, 8), (angles.cos(), angles.sin())
    return [(block, _swap_block, (_randn(2, 5, 8), *rest), {})]


_CASES: dict[type, Callable[[], list[_Case]]] = {
    host.AdaLayerNormZero: _norm_case(lambda: host.AdaLayerNormZero(8), (2, 8)),
    host.AdaLayerNormZeroSingle: _norm_case(lambda: host.AdaLayerNormZeroSingle(8), (2, 8)),
    host.SD35AdaLayerNormZeroX: _norm_case(lambda: host.SD35AdaLayerNormZeroX(8), (2, 8)),
    host.AdaLayerNormContinuous: _norm_case(lambda: host.AdaLayerNormContinuous(8, 6, elementwise_affine=False), (2, 6)),
    ResnetBlock2D: _resnet_cases,
    UNet2DModel: _output_cases(UNet2DModel),
    UNet2DConditionModel: _output_cases(UNet2DConditionModel, torch.zeros(2, 1, 4)),
    _processors.AttnProcessor2_0: _attention_cases,
    _processors.JointAttnProcessor2_0: _joint_cases,
    _processors.FluxAttnProcessor: _flux_cases,
    _processors.WanAttnProcessor: _wan_cases,
    BasicTransformerBlock: _basic_block_cases,
    JointTransformerBlock: _joint_block_cases,
    FluxTransformerBlock: _flux_block_cases,
    FluxSingleTransformerBlock: _flux_single_block_cases,
    WanTransformerBlock: _wan_block_cases,
}


def swap_resnet(block: Any) -> None:
    """Fuses a residual block's norms with the activation after them."""
    # With a scale and shift, the block's own arithmetic stands between its second norm and the activation.
    plain = block.time_embedding_norm == "scale_shift"
    _swap.swap(block.norm1, _resnet.FusedGroupNormSiLU)
    _swap.swap(block.norm2, _resnet.FusedGroupNorm if plain else _resnet.FusedGroupNormSiLU)
    _swap.swap(block.nonlinearity, _resnet.SiLUUnlessFused)


def swap_output(model: Any) -> None:
    """Fuses a U-Net's last norm with the activation after it."""
    _swap.swap(model.conv_norm_out, _resnet.FusedGroupNormSiLU)
    _swap.swap(model.conv_act, _resnet.SiLUUnlessFused)


def _swap_norms(module: Any) -> None:
    _swap.swap(module, _norms.REPLACEMENTS[type(module)])


def _swap_processor(module: Any) -> None:
    module.set_processor(_processors.REPLACEMENTS[type(module.processor)](module.processor))


def _swap_block(block: Any) -> None:
    for part in _blocks.parts(block).values():
        if hasattr(part, "processor"):
            _swap_processor(part)
        _blocks.fuse(part)


def _randomise(module: Any) -> None:
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, dtype=torch.float32) * 0.5)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32)


def _flat(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
