"""What tests of noise share: drawn by the kernel, by the definition, and how far apart they are."""

from __future__ import annotations

import numpy as np
import torch

from fastdiff_kernels import ops
from fastdiff_kernels.reference import philox

SEED = 20241203


def noise(*shape, seed=SEED, dtype=torch.float32, offset=0):
    return ops.lcss_noise(torch.empty(shape, dtype=dtype), seed, offset=offset)


def definition(*shape, seed=SEED, offset=0, stream="lcss"):
    return philox.normals(torch.Size(shape), seed, offset, stream, torch.device("cpu"))


def ulps(actual, expected):
    """The distance between two float32 tensors in steps of expected's last place."""
    spacing = torch.from_numpy(np.spacing(expected.abs().numpy()))
    return ((actual.double() - expected.double()).abs() / spacing).max().item()
