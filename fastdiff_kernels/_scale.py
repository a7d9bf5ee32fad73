"""What is left for backward where forward has written the gradients: the product with the loss's own gradient."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None

# Defined apart from the op table, whose ops write to no argument. Where the compiled library is missing it has no kernel.
_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define("scale_samples_(Tensor(a!) gradient, Tensor factor) -> ()")
_scale_samples = torch.ops.fastdiff.scale_samples_.default


@functools.cache
def _compiled() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastdiff::scale_samples_", "CPU")


def scale_samples(gradient: Tensor, factor: Tensor) -> Tensor:
    """factor * gradient for each sample, in gradient's own memory, which the caller gives up. Where factor is 1 nothing is touched.

    Args:
        gradient: [B, ...] contiguous; of a subclass (traced, fake, distributed) it is left as it was, for a compiler to fuse the product.
        factor: [B], float32 (float64 beside float64).
    """
    if type(gradient) is not Tensor or type(factor) is not Tensor:
        return (gradient * _shaped(factor, gradient)).to(gradient.dtype)
    if gradient.is_cpu and _compiled():
        _scale_samples(gradient, factor)
    elif gradient.is_cuda and _TRITON:
        from .triton._scale import scale_samples_

        scale_samples_(gradient, factor)
    elif gradient.is_cuda or not bool((factor == 1).all()):
        gradient.mul_(_shaped(factor, gradient))
    return gradient


def _shaped(factor: Tensor, gradient: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (gradient.dim() - 1))
