"""The attention blocks of score networks, each usable alone; one network's block a file."""

from .dit import Carry, DiTBlock
from .edm2 import EDM2AttentionBlock, MagnitudePreservingLinear
from .mmdit import MMDiTBlock
from .pixart import PixArtBlock
from .unet import UNetAttentionBlock, UNetResBlock

__all__ = [
    "Carry",
    "DiTBlock",
    "EDM2AttentionBlock",
    "MMDiTBlock",
    "MagnitudePreservingLinear",
    "PixArtBlock",
    "UNetAttentionBlock",
    "UNetResBlock",
]
