"""Score networks made of the ops: a small U-Net, a small DiT, and the attention blocks they share.

Every network is called `network(x, noise_level, class_labels=None)`; see `UNet` and `DiT`.
"""

from .blocks import DiTBlock, UNetAttentionBlock, UNetResBlock
from .dit import DiT
from .embedding import ConditionEmbedding, axial_rope, sincos_positions
from .unet import UNet

__all__ = [
    "ConditionEmbedding",
    "DiT",
    "DiTBlock",
    "UNet",
    "UNetAttentionBlock",
    "UNetResBlock",
    "axial_rope",
    "sincos_positions",
]
