"""What the machine can do at most, measured in the same run as the rows that are set against it."""

from __future__ import annotations

import functools

import torch

from .timing import interleave

COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
MATRIX = {"cpu": 1536, "cuda": 8192}


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, those read and those written counted, of one large copy."""
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, 0.3, device)["copy"].quantile(0.2)
    return 2 * source.numel() / seconds


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large matrix product."""
    n = MATRIX[device]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = interleave({"matmul": lambda: a @ b}, 0.3, device)["matmul"].quantile(0.2)
    return 2 * n**3 / seconds
