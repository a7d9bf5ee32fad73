"""What tests of noise share: drawn by the kernel, by the definition, how far apart they are, and noise with exact moments."""

from __future__ import annotations

import math

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


def orthonormal(count, *groups, dtype=torch.float64):
    """Samples whose empirical means and second moments are exactly those of independent standard normals. -> [count, width] each group"""
    # Orthogonal to the first column is of mean 0.
    q, _ = torch.linalg.qr(torch.cat((torch.ones(count, 1, dtype=dtype), torch.randn(count, sum(groups), dtype=dtype)), dim=1))
    return (math.sqrt(count) * q[:, 1:]).split(groups, dim=1)
