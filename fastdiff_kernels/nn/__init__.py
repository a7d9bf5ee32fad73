"""Score networks made of the ops: a small U-Net, a small DiT, and the attention blocks of these and larger networks.

Every network is called `network(x, noise_level, class_labels=None)`; see `UNet` and `DiT`.
"""

from .blocks import (
    Carry,
    DiTBlock,
    EDM2AttentionBlock,
    MagnitudePreservingLinear,
    MMDiTBlock,
    PixArtBlock,
    UNetAttentionBlock,
    UNetResBlock,
)
from .dit import DiT
from .embedding import ConditionEmbedding, axial_rope, sincos_positions
from .unet import UNet

__all__ = [
    "Carry",
    "ConditionEmbedding",
    "DiT",
    "DiTBlock",
    "EDM2AttentionBlock",
    "MMDiTBlock",
    "MagnitudePreservingLinear",
    "PixArtBlock",
    "UNet",
    "UNetAttentionBlock",
    "UNetResBlock",
    "axial_rope",
    "sincos_positions",
]
