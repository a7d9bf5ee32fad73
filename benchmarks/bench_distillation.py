"""The losses of SIM and moment matching on batches of CIFAR-10 images and of latents."""

from __future__ import annotations

import torch

from benchmarks.shapes import GPU
from benchmarks.workloads import Workload
from fastdiff_kernels import ops

_SHAPES_CPU = {"CIFAR-10": (128, 3, 32, 32), "SD": (16, 4, 64, 64)}
# Of which a tensor in bfloat16 is 3 MB, 100 MB, 2 MB and 67 MB.
SHAPES_GPU = {
    "CIFAR-10": (512, 3, 32, 32),
    "CIFAR-10, 100 MB": (16384, 3, 32, 32),
    "SD": (64, 4, 64, 64),
    "SDXL, 67 MB": (512, 4, 128, 128),
}
SHAPES = SHAPES_GPU if GPU else _SHAPES_CPU
# torch.compile adds a sample's terms in fewer lanes than eager, which is nearer the truth by up to this factor.
TOLERANCE = 8.0


def sim_loss(fake, teacher, sample):
    gap = fake - teacher
    return -(gap * (fake - sample)).flatten(1).sum(1) / (gap.square().flatten(1).sum(1) + 1e-6).sqrt()


def moment_matching_loss(sample, auxiliary, teacher):
    return (sample * (auxiliary - teacher).detach()).flatten(1).sum(1)


def auxiliary_loss(sample, auxiliary, teacher):
    return ((sample - auxiliary).square() + (teacher - auxiliary).square()).flatten(1).sum(1)


# Name: eager, ours, which of the three operands are differentiated, whether forward records their gradients.
OPS = {
    "sim_loss": (sim_loss, lambda *args: ops.sim_loss(*args, c=1e-3), (0, 1, 2), False),
    "moment_matching_loss": (moment_matching_loss, ops.moment_matching_loss, (0,), True),
    "moment_matching_auxiliary_loss": (auxiliary_loss, ops.moment_matching_auxiliary_loss, (1,), True),
}

WORKLOADS = [
    Workload(
        name, network, shape, lambda shape=shape: [torch.randn(shape) for _ in range(3)], eager, ours,
        gradients=places, recorded=recorded, factor=TOLERANCE,
    )
    for network, shape in SHAPES.items()
    for name, (eager, ours, places, recorded) in OPS.items()
]  # fmt: skip


def test_speed(case, measure):
    measure(case)
