"""Definition: the counter-based normals every seeded op shares.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by the 64-bit seed. The counter is
(element // 4, stream, low and high half of offset + sample); its four words give elements 4i to 4i + 3 by two Box-Muller pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STREAMS = {"lcss": 0, "posterior": 1}
MAX_SAMPLE_ELEMENTS = 1 << 34
_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both unsigned 32-bit values held in int64 (whose sign bit a direct product would overflow)."""
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    carried = high + (low >> 16)
    return carried >> 16, ((carried << 16) | (low & 0xFFFF)) & _MASK


def philox_words(seed: Tensor, stream: int, sample: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit words (as int64) of the counters made of sample and block, int64 tensors that broadcast."""
    sample, block = torch.broadcast_tensors(sample, block)
    c0, c1, c2, c3 = block & _MASK, torch.full_like(block, stream), sample & _MASK, (sample >> 32) & _MASK
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _wide_product(_MULTIPLIERS[0], c0)
        high1, low1 = _wide_product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    # The two uniforms are float32 by definition; the functions of them are taken in float64, so that this is the exact value.
    u = (radius_word.float() * 2.0**-32 + 2.0**-33).double()
    angle = 2 * math.pi * (angle_word.float() * 2.0**-32).double()
    radius = torch.sqrt(-2 * torch.log(u))
    return radius * torch.cos(angle), radius * torch.sin(angle)


def normals(shape: torch.Size, seed: int | Tensor, offset: int, stream: str, device: torch.device) -> Tensor:
    """Standard normals (float32) of a batch of that shape [B, ...], before any rounding to a narrower dtype."""
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    elements = math.prod(shape[1:])
    sample = torch.arange(shape[0], device=device)[:, None] + offset
    block = torch.arange((elements + 3) // 4, device=device)[None]
    w0, w1, w2, w3 = philox_words(seed, STREAMS[stream], sample, block)
    z = torch.stack((*_box_muller(w0, w1), *_box_muller(w2, w3)), dim=-1)  # [B, blocks, 4]
    return z.flatten(1)[:, :elements].reshape(shape).float()
