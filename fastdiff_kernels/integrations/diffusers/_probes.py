"""Each replacement against the installed diffusers on a tiny module, before it is used.

A release that computes something else than the one written against is thereby left alone, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import _swap
from .._policy import everywhere
from . import _blocks, _norms, _processors, _resnet
from . import _host as host
from ._deferred import Deferred

# Far above rounding in float32, far below any change of a formula at these random weights.
_TOLERANCE = 1e-4


@cache
def difference(replaced: Any) -> str | None:
    """Why nothing of the class `replaced` (a layer, a block, a processor) may be replaced here, or None."""
    cases = _CASES[replaced]
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False), _float32():
        torch.manual_seed(0)
        try:
            found = next(filter(None, (_differs(case) for case in cases())), None)
        except Exception as error:  # whatever another release says to what this one takes
            found = f"cannot be built and called as the one known here: {type(error).__name__}: {' '.join(str(error).split())}"
    return None if found is None else f"this version's {replaced.__name__} {found}"


def _differs(case: _Case) -> str | None:
    module, replace, args, kwargs = case
    _randomise(module)
    before = _flat(module(*args, **kwargs))
    replace(module)
    waited = Deferred.computed
    with everywhere():
        after = _flat(module(*args, **kwargs))
    if Deferred.computed != waited:
        return "does something else between its modules than the one known here"
    if [a.shape for a in after] != [b.shape for b in before]:
        return "returns other tensors than the one known here"
    largest = max((a - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in zip(after, before, strict=True))
    return None if largest <= _TOLERANCE else f"computes something else than the one known here (difference {largest:.1e})"


@contextmanager
def _float32() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


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
        return host.ResnetBlock2D(in_channels=4, out_channels=8, temb_channels=6, groups=2, **options).float()

    args = _randn(2, 4, 4, 4), _randn(2, 6)
    kinds: list[dict] = [{}, {"time_embedding_norm": "scale_shift"}, {"up": True}, {"down": True}]
    return [(build(**kind), swap_resnet, args, {}) for kind in kinds]


def _output_cases(build: Callable[..., nn.Module], *extra: tuple[int, ...]) -> Callable[[], list[_Case]]:
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
        args = (_randn(2, 2, 4, 4), torch.tensor([3, 700]), *(torch.zeros(shape) for shape in extra))
        return [(model.float(), swap_output, args, {"return_dict": False})]

    return cases


def _attention_cases() -> list[_Case]:
    spatial = host.Attention(8, heads=2, dim_head=4, norm_num_groups=2, bias=True, residual_connection=True, rescale_output_factor=2.0)
    cross = host.Attention(8, cross_attention_dim=6, heads=2, dim_head=4, cross_attention_norm="layer_norm", qk_norm="layer_norm")
    mask = torch.tensor([[[0.0, 0, 0, 0, 0]], [[0.0, 0, -10000, -10000, -10000]]])  # [B, 1, M]
    return [
        (spatial, _swap_processor, (_randn(2, 8, 3, 3),), {}),
        (cross, _swap_processor, (_randn(2, 4, 8), _randn(2, 5, 6), mask), {}),
    ]


def _joint_cases() -> list[_Case]:
    processor = host.JointAttnProcessor2_0()
    joint = host.Attention(
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
    double = host.FluxAttention(8, heads=2, dim_head=4, out_dim=8, added_kv_proj_dim=8, context_pre_only=False, bias=True)
    single = host.FluxAttention(8, heads=2, dim_head=4, out_dim=8, pre_only=True, bias=True)
    angles = _randn(7, 2).repeat_interleave(2, dim=1)
    rotary = {"image_rotary_emb": (angles.cos(), angles.sin())}
    return [(double, _swap_processor, (_randn(2, 4, 8), _randn(2, 3, 8)), rotary), (single, _swap_processor, (_randn(2, 7, 8),), rotary)]


def _wan_cases() -> list[_Case]:
    alone, cross = host.WanAttention(8, heads=2, dim_head=4), host.WanAttention(8, heads=2, dim_head=4, cross_attention_dim_head=4)
    angles = _randn(1, 5, 1, 2).repeat_interleave(2, dim=3)
    for module in (alone, cross):
        module.set_processor(host.WanAttnProcessor())
    return [
        (alone, _swap_processor, (_randn(2, 5, 8), None, None, (angles.cos(), angles.sin())), {}),
        (cross, _swap_processor, (_randn(2, 5, 8), _randn(2, 3, 8)), {}),
    ]


def _basic_block_cases() -> list[_Case]:
    options: dict = {"attention_bias": True, "norm_elementwise_affine": False}
    zero = host.BasicTransformerBlock(8, 2, 4, norm_type="ada_norm_zero", num_embeds_ada_norm=10, **options).eval()
    single = host.BasicTransformerBlock(8, 2, 4, norm_type="ada_norm_single", cross_attention_dim=8, **options)
    x, labels = _randn(2, 4, 8), torch.tensor([3, 7])
    return [
        (zero, _swap_block, (x,), {"timestep": labels, "class_labels": labels}),
        (single, _swap_block, (x,), {"timestep": _randn(2, 48), "encoder_hidden_states": _randn(2, 3, 8)}),
    ]


def _joint_block_cases() -> list[_Case]:
    args = _randn(2, 4, 8), _randn(2, 3, 8), _randn(2, 8)
    kinds: list[dict] = [{"use_dual_attention": True, "qk_norm": "rms_norm"}, {}]
    return [(host.JointTransformerBlock(8, 2, 4, **kind), _swap_block, args, {}) for kind in kinds]


def _flux_block_cases() -> list[_Case]:
    return [(host.FluxTransformerBlock(8, 2, 4), _swap_block, (_randn(2, 4, 8), _randn(2, 3, 8), _randn(2, 8)), {})]


def _flux_single_block_cases() -> list[_Case]:
    return [(host.FluxSingleTransformerBlock(8, 2, 4), _swap_block, (_randn(2, 4, 8), _randn(2, 3, 8), _randn(2, 8)), {})]


def _wan_block_cases() -> list[_Case]:
    block = host.WanTransformerBlock(dim=8, ffn_dim=12, num_heads=2, cross_attn_norm=True)
    angles = _randn(1, 5, 1, 2).repeat_interleave(2, dim=3)
    rest = _randn(2, 3, 8), _randn(2, 6, 8), (angles.cos(), angles.sin())
    return [(block, _swap_block, (_randn(2, 5, 8), *rest), {})]


_CASES: dict[type, Callable[[], list[_Case]]] = {
    host.AdaLayerNormZero: _norm_case(lambda: host.AdaLayerNormZero(8), (2, 8)),
    host.AdaLayerNormZeroSingle: _norm_case(lambda: host.AdaLayerNormZeroSingle(8), (2, 8)),
    host.SD35AdaLayerNormZeroX: _norm_case(lambda: host.SD35AdaLayerNormZeroX(8), (2, 8)),
    host.AdaLayerNormContinuous: _norm_case(lambda: host.AdaLayerNormContinuous(8, 6, elementwise_affine=False), (2, 6)),
    host.ResnetBlock2D: _resnet_cases,
    host.UNet2DModel: _output_cases(host.UNet2DModel),
    host.UNet2DConditionModel: _output_cases(host.UNet2DConditionModel, (2, 1, 4)),
    host.AttnProcessor2_0: _attention_cases,
    host.JointAttnProcessor2_0: _joint_cases,
    host.FluxAttnProcessor: _flux_cases,
    host.WanAttnProcessor: _wan_cases,
    host.BasicTransformerBlock: _basic_block_cases,
    host.JointTransformerBlock: _joint_block_cases,
    host.FluxTransformerBlock: _flux_block_cases,
    host.FluxSingleTransformerBlock: _flux_single_block_cases,
    host.WanTransformerBlock: _wan_block_cases,
}


def swap_resnet(block: Any) -> None:
    """Fuses a residual block's norms with the activation after them."""
    # With a scale and shift, the block's own arithmetic stands between its second norm and the activation.
    plain = block.time_embedding_norm == "scale_shift"
    _swap.swap(block.norm1, _resnet.FusedGroupNormSiLU)
    _swap.swap(block.norm2, _resnet.FusedGroupNorm if plain else _resnet.FusedGroupNormSiLU)
    _swap.swap(block.nonlinearity, _resnet.SiLUAfterNorm)


def swap_output(model: Any) -> None:
    """Fuses a U-Net's last norm with the activation after it."""
    _swap.swap(model.conv_norm_out, _resnet.FusedGroupNormSiLU)
    _swap.swap(model.conv_act, _resnet.SiLUAfterNorm)


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
