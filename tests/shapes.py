"""Sizes of the networks that the kernels are for, each size once, by the name of one of the networks that have it.

How many rows and samples stand beside a size is each test's own affair: few, since a kernel's tiles follow these sizes.
"""

from __future__ import annotations

# Channels of what is normalised and modulated.
CHANNELS = {
    "HDiT-128": 128,
    "EDM": 256,
    "SD1.5-64": 320,
    "DiT-S/2": 384,
    "HDiT-512": 512,
    "SDXL-64": 640,
    "DiT-B/2": 768,
    "DiT-L/2": 1024,
    "DiT-XL/2": 1152,
    "SDXL-32": 1280,
    "SD3": 1536,
    "Sana": 2240,
    "SD3.5-large": 2432,
    "Flux": 3072,
    "Z-Image": 3840,
    "Wan-14B": 5120,
    "Flux.2": 6144,
}

# Heads of attention, and the width of one.
HEADS = {
    "EDM": (1, 256),
    "UNet2DModel-448": (56, 8),
    "UNet2DModel-672": (84, 8),
    "UNet2DModel-896": (112, 8),
    "Sana": (70, 32),
    "SD1.5-64": (8, 40),
    "HDiT-128": (2, 64),
    "HDiT-256": (4, 64),
    "ADM-64, 32": (6, 64),
    "ADM-256, 32": (8, 64),
    "ADM-64, 16": (9, 64),
    "SDXL-64": (10, 64),
    "DiT-B/2": (12, 64),
    "EDM2-L, 16": (15, 64),
    "DiT-L/2": (16, 64),
    "EDM2-XL, 16": (18, 64),
    "SDXL-32": (20, 64),
    "EDM2-XXL, 16": (21, 64),
    "SD3": (24, 64),
    "EDM2-XXL, 8": (28, 64),
    "SD3.5-large": (38, 64),
    "DiT-XL/2": (16, 72),
    "SD1.5-32": (8, 80),
    "Sana captions": (20, 112),
    "ADM-128, 32": (4, 128),
    "Wan-1.3B": (12, 128),
    "Flux": (24, 128),
    "Z-Image": (30, 128),
    "Wan-14B": (40, 128),
    "Flux.2": (48, 128),
    "SD1.5-16": (8, 160),
    "ADM-128, 16": (4, 192),
    "ADM-128, 8": (4, 256),
}

# Channels of the maps that a group norm takes, and its groups; in a U-Net's second half they hold two layers' channels.
MAPS = {
    "small U-Net": (64, 8),
    "EDM-128": (128, 32),
    "ADM-64, 64": (192, 32),
    "UNet2DModel-224": (224, 32),
    "EDM": (256, 32),
    "SD1.5-64": (320, 32),
    "ADM-64, 32": (384, 32),
    "UNet2DModel-448": (448, 32),
    "ADM-256, 32": (512, 32),
    "ADM-64, 16": (576, 32),
    "SDXL-64": (640, 32),
    "UNet2DModel-672": (672, 32),
    "ADM-64, 8": (768, 32),
    "UNet2DModel-896": (896, 32),
    "SD1.5-64, two layers": (960, 32),
    "ADM-256, 16": (1024, 32),
    "SD1.5-16": (1280, 32),
    "ADM-64, two layers": (1536, 32),
    "SD1.5-32, two layers": (1920, 32),
    "ADM-256, two layers": (2048, 32),
    "SD1.5-16, two layers": (2560, 32),
}

# Widths of heads, each once.
HEAD_WIDTHS = sorted({width for _, width in HEADS.values()})
