"""What the losses and steps share, whose operands are batches of samples [B, ...] and constants [B] or [1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._common import absent, launch

_BLOCK = 1024
# Four elements a thread; with twice as many, Blackwell's assembler spills in the sums.
WARPS = 8


def stride(constant: Tensor) -> int:
    """From one sample's constant to the next: [1] holds for all."""
    return 0 if constant.numel() == 1 else constant.stride(0)


def wanted(like: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Room for the gradients that are needed."""
    return tuple(like.new_empty(like.shape) if need else None for need in needs)


def or_absent(gradients: Sequence[Tensor | None], x: Tensor) -> tuple[Tensor, ...]:
    """The gradients, with what stands for absence where there is none."""
    return tuple(absent(x) if gradient is None else gradient for gradient in gradients)


def launch_blocks(kernel: triton.JITFunction, x: Tensor, *args: object, **constants: Any) -> None:
    """Runs kernel(*args, elements, blocks, BLOCK) once for every block of every sample of x."""
    if x.numel() == 0:
        return
    elements = x.numel() // x.shape[0]
    blocks = triton.cdiv(elements, _BLOCK)
    launch(kernel, x.shape[0] * blocks, *args, elements, blocks, BLOCK=_BLOCK, num_warps=WARPS, **constants)


@triton.jit
def ratio(a, b):
    """a / b, correctly rounded; the plain division of float32 is not."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)
