"""The counter-based normals of reference/philox.py on GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LCSS = tl.constexpr(0)
POSTERIOR = tl.constexpr(1)


@triton.jit
def _log(x):
    """The logarithm of a normal positive number; csrc/include/fastdiff/math.h says why it is exact enough."""
    shifted = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, 2.0 + f)
    z = s * s
    r = z * (0.66666667 + z * (0.4 + z * (0.28571429 + z * 0.22222222)))
    h = 0.5 * f * f
    return e * 0.693145752 + (f - (h - (s * (h + r) + e * 1.42860677e-6)))


@triton.jit
def _sincospi(x):
    """sin and cos of pi x for x in [0, 2]; as in csrc/include/fastdiff/math.h."""
    quadrant = (2.0 * x + 0.5).to(tl.int32)
    t = x - 0.5 * quadrant.to(tl.float32)
    u = t * t
    high = (t.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    rest = t * (9.67653590e-4 + u * (-5.16771278 + u * (2.55016404 + u * (-0.599264529 + u * 0.0821458866))))
    s = high * 3.140625 + ((t - high) * 3.140625 + rest)
    half_square = u * 4.93480220
    near = 1.0 - half_square
    c = near + (((1.0 - near) - half_square) + u * u * (4.05871213 + u * (-1.33526277 + u * (0.235330630 + u * -0.0258068913))))
    swap = (quadrant & 1) != 0
    sine = tl.where(swap, c, s)
    cosine = tl.where(swap, s, c)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def _box_muller(radius_word, angle_word):
    u = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt_rn(-2.0 * _log(u))
    sine, cosine = _sincospi(angle_word.to(tl.float32) * 4.656612873077393e-10)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, stream: tl.constexpr, sample, begin, BLOCK: tl.constexpr):
    """The normals (float32 [BLOCK]) of elements begin to begin + BLOCK - 1 of an int64 sample index; begin a multiple of 4."""
    block = (begin // 4).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    zero = block * 0
    low = zero + (sample & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block, zero + stream, low, high)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


def seed_beside(seed: Tensor, x: Tensor) -> Tensor:
    """The seed on x's device; one on the CPU goes there as a kernel argument, which waits for nothing and can be captured in a graph."""
    return seed if seed.device == x.device else torch.full((), int(seed), dtype=torch.int64, device=x.device)
