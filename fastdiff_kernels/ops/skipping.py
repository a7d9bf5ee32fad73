"""Criteria for reusing a network's output (AdaptiveDiffusion; Ye, Yuan et al., arXiv 2410.09873)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch  # noqa: F401  (registers the ops)
from ._checks import check_like, check_tensor

_third_order_skip = torch.ops.fastdiff.third_order_skip.default
_third_order_difference = torch.ops.fastdiff.third_order_difference.default


def third_order_skip(d0: Tensor, d1: Tensor, d2: Tensor, threshold: float | Tensor) -> Tensor:
    """|(d0 + d2) / 2 - d1| <= threshold * d1, elementwise: whether the next network call can be skipped.

    d_k = mean |X_k - X_(k-1)| are the last three mean changes of the latent; where they are all but linear in k the network's output
    is reused (arXiv 2410.09873; the authors' code differences the means, not the latents). The answer stays on the device. Compared in
    float32 (float64 for float64 changes); a NaN gives False.

    Args:
        d0, d1, d2: changes of one shape (0-d, [B] or any), dtype and device, the newest last; float32, bfloat16, float16 or float64. A
            layout other than contiguous is copied once.
        threshold: at least 0: float, or a tensor 0-d or [1], float32 or float64. A float64 one is rounded to float32 beside narrower
            changes.

    Returns:
        bool, the shape of d0, contiguous. For inference only: arguments must not require grad.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "third_order_skip"
    check_tensor(op, "d0", d0, min_dims=0)
    check_like(op, "d1", d1, "d0", d0)
    check_like(op, "d2", d2, "d0", d0)
    return _third_order_skip(d0, d1, d2, _threshold(op, threshold, d0))


def third_order_difference(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor) -> tuple[Tensor, Tensor]:
    """Means over each sample of |x3 - 3 x2 + 3 x1 - x0| and of |x3 - x2|, in one pass over four successive latents.

    The vector form of the criterion of arXiv 2410.09873: the network is called where the first is larger than a threshold times the
    second. Differences and sums are float32 (float64 for float64 latents), whatever the latents' dtype.

    Args:
        x0, x1, x2, x3: [B, ...], one shape, dtype and device, the newest last; float32, bfloat16, float16 or float64. A layout other
            than contiguous is copied once.

    Returns:
        Two tensors [B], float32 (float64 for float64 latents); NaN for samples without elements. For inference only: arguments must not
        require grad.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "third_order_difference"
    check_tensor(op, "x0", x0)
    for name, x in (("x1", x1), ("x2", x2), ("x3", x3)):
        check_like(op, name, x, "x0", x0)
    return _third_order_difference(x0, x1, x2, x3)


def _threshold(op: str, threshold: float | Tensor, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(threshold, Tensor):
        if threshold.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: threshold must be float32 or float64; got {threshold.dtype}")
        if threshold.numel() != 1 or threshold.dim() > 1:
            raise ValueError(f"{op}: threshold must be a float or a tensor 0-d or of shape (1,); got shape {tuple(threshold.shape)}")
        if threshold.device != like.device:
            raise ValueError(f"{op}: threshold must be on the device of d0, {like.device}; got {threshold.device}")
        if threshold.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_threshold(op, float(threshold.detach()))
        return threshold.reshape(1).to(dtype)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"{op}: threshold must be a float or a tensor; got {type(threshold).__name__}")
    _check_threshold(op, float(threshold))
    return torch.full((1,), float(threshold), dtype=dtype, device=like.device)


def _check_threshold(op: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{op}: threshold must be finite and at least 0; got {value}")
