"""Shapes of networks as they are run: batches that fill a GPU, and a part of them, small enough to be timed, on a CPU."""

from __future__ import annotations

import torch

GPU = torch.cuda.is_available()

# Batch, queries, heads, width of self-attention.
_ATTENTION_CPU = {
    "EDM-16": (16, 256, 1, 256),
    "EDM-8": (16, 64, 1, 256),
    "ADM-32": (1, 1024, 6, 64),
    "EDM2-XS": (16, 256, 6, 64),
    "DiT-XL/2": (4, 256, 16, 72),
    "PixArt-512": (1, 1024, 16, 72),
    "SD1.5-32": (1, 1024, 8, 80),
}
ATTENTION_GPU = {
    "EDM-16": (64, 256, 1, 256),
    "EDM-8": (64, 64, 1, 256),
    "ADM-32": (16, 1024, 6, 64),
    "EDM2-S": (64, 256, 9, 64),
    "EDM2-S, 8": (64, 64, 12, 64),
    "DiT-L/2": (64, 256, 16, 64),
    "DiT-XL/2": (64, 256, 16, 72),
    "DiT-XL/2, 512": (16, 1024, 16, 72),
    "PixArt-512": (16, 1024, 16, 72),
    "PixArt-1024": (2, 4096, 16, 72),
    "SD1.5-64": (2, 4096, 8, 40),
    "SD1.5-32": (2, 1024, 8, 80),
    "SD1.5-16": (2, 256, 8, 160),
    "SDXL-64": (2, 4096, 10, 64),
    "SDXL-32": (2, 1024, 20, 64),
    "SD3.5": (2, 4429, 24, 64),
    "Flux": (1, 4608, 24, 128),
    "Wan-1.3B": (1, 32760, 12, 128),
    "Wan-14B": (1, 75600, 40, 128),
}
ATTENTION = ATTENTION_GPU if GPU else _ATTENTION_CPU
# Cross-attention to captions: the queries, and how many keys.
CROSS = {"PixArt-1024 captions": ((2 if GPU else 1, 4096, 16, 72), 120)}

# Batch, rows, channels of what is normalised and modulated.
_ROWS_CPU = {"DiT-XL/2": (4, 256, 1152), "PixArt-512": (1, 1024, 1152), "EDM": (16, 256, 256)}
ROWS_GPU = {
    "DiT-XL/2": (64, 256, 1152),
    "PixArt-512": (16, 1024, 1152),
    "EDM": (64, 256, 256),
    "PixArt-1024": (2, 4096, 1152),
    "SD3.5-medium": (2, 4429, 1536),
    "SD3.5-large": (2, 4429, 2432),
    "Flux": (1, 4608, 3072),
    "Flux.2": (1, 4608, 6144),
    "Wan-1.3B": (1, 32760, 1536),
    "Wan-14B": (1, 75600, 5120),
}
ROWS = ROWS_GPU if GPU else _ROWS_CPU

# The map that a group norm takes, and its groups.
_MAPS_CPU = {"small U-Net": ((128, 64, 8, 8), 8), "EDM": ((16, 256, 16, 16), 32), "SD": ((4, 320, 64, 64), 32)}
MAPS_GPU = {
    "small U-Net": ((2048, 64, 8, 8), 8),
    "EDM": ((64, 256, 16, 16), 32),
    "ADM-32": ((16, 384, 32, 32), 32),
    "SD": ((4, 320, 64, 64), 32),
    "SD, 640": ((4, 640, 64, 64), 32),
    "SD, 1280": ((4, 1280, 32, 32), 32),
    "SD, 1920": ((4, 1920, 16, 16), 32),
    "SD, 2560": ((4, 2560, 8, 8), 32),
}
MAPS = MAPS_GPU if GPU else _MAPS_CPU
