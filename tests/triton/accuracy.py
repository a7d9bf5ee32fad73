"""Launchers against the definitions of the ops they implement."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdiff_kernels._companions import TABLE
from tests.helpers import assert_within_eager, outputs_of


def check(module: ModuleType, name: str, args: Sequence[Any]) -> None:
    """The launcher's outputs are as near the float64 truth as the definition's in the same dtype."""
    found = outputs_of(getattr(module, name)(*args))
    eager = outputs_of(TABLE[name].reference(*args))
    truth = outputs_of(TABLE[name].reference(*[a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]))
    assert len(found) == len(eager)
    tensors = [a for a in args if isinstance(a, Tensor)]
    seeded = any(a.dtype == torch.int64 for a in tensors)
    wide = all(a.dtype in (torch.float64, torch.int64) for a in tensors)
    for f, e, t in zip(found, eager, truth, strict=True):
        assert f.shape == e.shape
        if t.numel() == 0:
            continue
        assert f.dtype == e.dtype
        if wide:
            # Seeded normals are float32 values, equal to 2 ulp; stored ones are what they are.
            tolerance = 1e-6 if seeded else 1e-12
            torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)
        else:
            narrow = torch.float32 if f.dtype == torch.float64 else f.dtype
            assert_within_eager(f.to(narrow), e.to(narrow), t)


def normals(shape: Sequence[int], dtype: torch.dtype, device: str, count: int) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for _ in range(count)]


def constants(batch: int, dtype: torch.dtype, device: str, lengths: Sequence[int] | None = None) -> list[Tensor]:
    """Between 0.5 and 1.5: two of shape [batch] and one of [1] unless told otherwise, in the dtype that the ops are given."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [(torch.rand(n, device=device) + 0.5).to(wide) for n in lengths or (batch, batch, 1)]
