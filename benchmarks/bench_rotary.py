"""Query and key normalisation with rotary embedding, and the pixel norm of queries, keys and values, from one projection."""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm, rms_norm

from benchmarks import rivals
from benchmarks.shapes import GPU
from benchmarks.workloads import Workload
from fastdiff_kernels import ops

EPS = 1e-6


def rms(x, eps, weight):
    return rms_norm(x, weight.shape, weight, eps)


def layer(x, eps, weight):
    return layer_norm(x, weight.shape, weight, eps=eps)


def of_heads(x, weight, norm):
    """The norm of each head or, with a weight of their size, of all heads of a token."""
    rows = x.flatten(2) if weight.numel() > x.shape[-1] else x
    return norm(rows, EPS, weight).view(x.shape)


def interleaved(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def half(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def composed(rope, norm):
    """Of packed [B, N, 3, H, D], two weights, and angles [N, D/2] unless rope is None, with one of the norms above or a library's."""

    def run(packed, q_weight, k_weight, *angles):
        q, k, _ = packed.unbind(2)
        q, k = of_heads(q, q_weight, norm), of_heads(k, k_weight, norm)
        if rope is None:
            return q, k
        turn, (cos, sin) = interleaved if rope == "interleaved" else half, (a.unsqueeze(1) for a in angles)
        return turn(q, cos, sin).to(q.dtype), turn(k, cos, sin).to(k.dtype)

    return run


def fused(norm, rope):
    def run(packed, q_weight, k_weight, *angles):
        q, k, _ = packed.unbind(2)
        whole = "_heads" if q_weight.numel() > q.shape[-1] else ""
        return ops.qk_norm_rope(q, k, q_weight, k_weight, *angles, norm=norm + whole, rope=rope or "half", eps=EPS)

    return run


def operands(batch, rows, heads, width, whole=False, rotated=True):
    size = heads * width if whole else width
    angle = torch.randn(rows, width // 2)
    angles = [angle.cos(), angle.sin()] if rotated else []
    return [torch.randn(batch, rows, 3, heads, width), torch.randn(size), torch.randn(size), *angles]


def pixel_norm(packed, dim):
    return tuple((x / (1e-4 + x.square().mean(-1, keepdim=True).sqrt())).contiguous() for x in parts(packed, dim))


def parts(packed, dim):
    """q, k, v [B, N, H, D] of [B, N, 3, H, D] (dim 2) or [B, H, D, 3, N] (dim 3)."""
    return packed.unbind(dim) if dim == 2 else [x.permute(0, 3, 1, 2) for x in packed.unbind(dim)]


def packed_pixel_norm(packed):
    return packed / (1e-4 + packed.square().mean(-1, keepdim=True).sqrt())


def norm_workload(network, shape, norm, rope, whole=False):
    libraries = rivals.of("rms_norm", lambda part: composed(rope, part)) if norm == "rms" else {}
    # Inductor sums the weights' gradients over thousands of tokens in one chain, some twenty times less exactly than eager.
    return Workload(
        "qk_norm_rope", f"{network} {norm}{'_heads' * whole} {rope}", shape, lambda: operands(*shape, whole, rope is not None),
        composed(rope, rms if norm == "rms" else layer), fused(norm, rope), gradients=(0, 1, 2), factor=32.0, **libraries,
    )  # fmt: skip


def pixel_workload(network, shape, dim):
    batch, rows, heads, width = shape
    sizes = (batch, rows, 3, heads, width) if dim == 2 else (batch, heads, width, 3, rows)
    return Workload(
        "qkv_pixel_norm", f"{network} {'packed' if dim == 2 else 'tokens innermost'}", shape, lambda: [torch.randn(sizes)],
        lambda packed: pixel_norm(packed, dim), lambda packed: ops.qkv_pixel_norm(*parts(packed, dim)), gradients=(0,), factor=8.0,
    )  # fmt: skip


DIT, PIXART, WAN, EDM2 = (
    ((64, 256, 16, 72), (2, 4096, 16, 72), (1, 32760, 12, 128), (64, 256, 8, 64))
    if GPU
    else ((4, 256, 16, 72), (1, 1024, 16, 72), (1, 256, 12, 128), (16, 256, 8, 64))
)
PIXART_NAME = "PixArt-1024" if GPU else "PixArt-512"
WORKLOADS = [
    norm_workload("DiT-XL/2", DIT, "rms", "interleaved"),
    norm_workload("DiT-XL/2", DIT, "rms", "half"),
    norm_workload(PIXART_NAME, PIXART, "rms", "interleaved"),
    norm_workload(PIXART_NAME, PIXART, "layer", None, whole=True),
    norm_workload("Wan", WAN, "rms", "interleaved", whole=True),
    *([norm_workload("Flux", (1, 4608, 24, 128), "rms", "interleaved")] if GPU else []),
    Workload(
        "pixel_norm", "EDM2", EDM2, lambda: [torch.randn(EDM2[0], EDM2[1], 3 * EDM2[2], EDM2[3])],
        packed_pixel_norm, ops.pixel_norm, gradients=(0,), factor=8.0,
    ),
    pixel_workload("EDM2", EDM2, 2),
    pixel_workload("EDM2", EDM2, 3),
]  # fmt: skip


def test_speed(case, measure):
    measure(case)
