"""Definitions: the third-order difference criteria by which AdaptiveDiffusion skips network calls."""

from __future__ import annotations

from torch import Tensor

from ._common import compute_dtype, mean_per_sample


def third_order_skip(d0: Tensor, d1: Tensor, d2: Tensor, threshold: float | Tensor) -> Tensor:
    """|(d0 + d2) / 2 - d1| <= threshold * d1, elementwise; d2 the newest."""
    dtype = compute_dtype(d0)
    d0, d1, d2 = (d.to(dtype) for d in (d0, d1, d2))
    # Of shape [1] it would give a result for 0-d changes a dimension.
    bound = threshold.reshape(()).to(dtype) if isinstance(threshold, Tensor) else threshold
    return ((d0 + d2) / 2 - d1).abs() <= bound * d1


def third_order_difference(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor) -> tuple[Tensor, Tensor]:
    """Means over each sample of |x3 - 3 x2 + 3 x1 - x0| and of |x3 - x2|."""
    dtype = compute_dtype(x0)
    x0, x1, x2, x3 = (x.to(dtype) for x in (x0, x1, x2, x3))
    return mean_per_sample((x3 - x0 - 3 * (x2 - x1)).abs()), mean_per_sample((x3 - x2).abs())
