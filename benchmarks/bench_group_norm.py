"""Group normalisation and SiLU, plain and with scale and shift, on the maps of a small pixel U-Net, EDM's and Stable Diffusion's."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks import rivals
from benchmarks.shapes import MAPS
from benchmarks.workloads import Workload
from fastdiff_kernels import ops


def operands(shape: tuple[int, ...], channels_last: bool, modulated: bool) -> list[torch.Tensor]:
    """x, weight and bias, and the two halves of one projection as scale and shift."""
    batch, channels = shape[:2]
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    modulation = torch.randn(batch, 2 * channels).chunk(2, dim=1) if modulated else ()
    return [x, torch.randn(channels), torch.randn(channels), *modulation]


def workload(network: str, channels_last: bool, modulated: bool) -> Workload:
    shape, groups = MAPS[network]

    def eager(x, weight, bias, scale=None, shift=None):
        y = F.group_norm(x, groups, weight, bias)
        return F.silu(y if scale is None else y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

    def ours(x, *parameters):
        return ops.group_norm_silu(x, groups, *parameters)

    def composed(norm):
        def run(x, weight, bias, scale=None, shift=None):
            y = norm(x, groups, weight, bias, 1e-5)
            return F.silu(y if scale is None else y * (1 + scale[:, :, None, None]) + shift[:, :, None, None])

        return run

    return Workload(
        "group_norm_silu" + ("" if modulated else ", plain"),
        network,
        "x".join(map(str, shape)) + (" NHWC" if channels_last else ""),
        lambda: operands(shape, channels_last, modulated),
        eager,
        ours,
        gradients=tuple(range(5 if modulated else 3)),
        # Inductor sums the parameters' gradients over the positions less exactly than eager does.
        factor=8.0,
        **rivals.of("group_norm", composed),
    )


WORKLOADS = [
    workload(network, channels_last, modulated) for network in MAPS for channels_last in (False, True) for modulated in (True, False)
]


def test_speed(case, measure):
    measure(case)
