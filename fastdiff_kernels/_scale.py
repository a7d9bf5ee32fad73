"""What is left for backward where forward has written the gradients: the product with the loss's own gradient."""

from __future__ import annotations

import importlib.util

from torch import Tensor

_TRITON = importlib.util.find_spec("triton") is not None


def scale_samples(gradient: Tensor, factor: Tensor) -> Tensor:
    """factor * gradient for each sample, in gradient's own memory, which the caller gives up. Where factor is 1 nothing is touched.

    Args:
        gradient: [B, ...] contiguous; of a subclass (traced, fake, distributed) it is left as it was, for a compiler to fuse the product.
        factor: [B], float32 (float64 beside float64).
    """
    shaped = factor.reshape(-1, *[1] * (gradient.dim() - 1))
    if type(gradient) is not Tensor or type(factor) is not Tensor:
        return (gradient * shaped).to(gradient.dtype)
    if gradient.is_cuda and _TRITON:
        from .triton._scale import scale_samples_

        scale_samples_(gradient, factor)
    elif gradient.is_cuda or not bool((factor == 1).all()):
        gradient.mul_(shaped)
    return gradient
