"""What the Triton kernels and launchers of every family share."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def widen(x):
    """x in the dtype arithmetic is done in: float64 stays, everything narrower becomes float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `widen` of x's elements, for what launchers allocate."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def capability(x: Tensor) -> int:
    """The compute capability of x's GPU, 90 for 9.0; 0 for tensors that Triton's interpreter takes."""
    return _capability(x.device)


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(
    kernel: triton.JITFunction, programs: int, *args: object, num_warps: int = 4, enable_fp_fusion: bool = True, **constants: object
) -> None:
    """Runs `programs` instances of a kernel (none at all for 0) on the device of the first tensor in args.

    Fused multiply-adds are on unless a kernel must do without; Triton's own default depends on its version.
    """
    if programs == 0:
        return
    options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion, **constants}
    tensor = next(t for a in args for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, Tensor))
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[(programs,)](*args, **options)
    else:
        kernel[(programs,)](*args, **options)


def registers_for(x: Tensor) -> dict[str, Any]:
    """An option of `launch`. Unless ptxas is told how many registers a thread may take, it spills what float16 is converted to on
    capability 120, to fit more programs on a multiprocessor."""
    return {"maxnreg": 128} if x.dtype == torch.float16 else {}


def absent(x: Tensor) -> Tensor:
    """What stands for a gradient nobody asked for."""
    return x.new_empty(0)
