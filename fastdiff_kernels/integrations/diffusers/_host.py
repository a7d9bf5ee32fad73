"""diffusers' classes, looked up by name: one that the installed release lacks takes along what is written for it, and nothing else."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

MISSING: list[str] = []
"""What this release does not have, for the report."""


try:
    attention_dispatch: Any = import_module("diffusers.models.attention_dispatch")
except ImportError:
    attention_dispatch = None


def _class(module: str, name: str) -> Any:
    """A class of diffusers or, where there is none of that name, an empty one that nothing is an instance of."""
    try:
        return getattr(import_module(f"diffusers.models.{module}"), name)
    except (ImportError, AttributeError):
        MISSING.append(name)
        return type(name, (nn.Module,), {})


AdaLayerNormContinuous = _class("normalization", "AdaLayerNormContinuous")
AdaLayerNormZero = _class("normalization", "AdaLayerNormZero")
AdaLayerNormZeroSingle = _class("normalization", "AdaLayerNormZeroSingle")
FP32LayerNorm = _class("normalization", "FP32LayerNorm")
RMSNorm = _class("normalization", "RMSNorm")
SD35AdaLayerNormZeroX = _class("normalization", "SD35AdaLayerNormZeroX")

Attention = _class("attention_processor", "Attention")
AttnProcessor2_0 = _class("attention_processor", "AttnProcessor2_0")
JointAttnProcessor2_0 = _class("attention_processor", "JointAttnProcessor2_0")
FluxAttention = _class("transformers.transformer_flux", "FluxAttention")
FluxAttnProcessor = _class("transformers.transformer_flux", "FluxAttnProcessor")
WanAttention = _class("transformers.transformer_wan", "WanAttention")
WanAttnProcessor = _class("transformers.transformer_wan", "WanAttnProcessor")

BasicTransformerBlock = _class("attention", "BasicTransformerBlock")
FeedForward = _class("attention", "FeedForward")
FluxSingleTransformerBlock = _class("transformers.transformer_flux", "FluxSingleTransformerBlock")
FluxTransformerBlock = _class("transformers.transformer_flux", "FluxTransformerBlock")
JointTransformerBlock = _class("attention", "JointTransformerBlock")
ResnetBlock2D = _class("resnet", "ResnetBlock2D")
WanTransformerBlock = _class("transformers.transformer_wan", "WanTransformerBlock")

UNet2DModel = _class("unets.unet_2d", "UNet2DModel")
UNet2DConditionModel = _class("unets.unet_2d_condition", "UNet2DConditionModel")
