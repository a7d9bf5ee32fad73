"""The losses of SIM and moment matching on batches of CIFAR-10 images and of 64 x 64 latents."""

from __future__ import annotations

import torch

from benchmarks.workloads import Workload
from fastdiff_kernels import ops

SHAPES = {"CIFAR-10": (128, 3, 32, 32), "SD": (16, 4, 64, 64)}
# torch.compile adds a sample's terms in fewer lanes than eager, which is nearer the truth by up to this factor.
TOLERANCE = 8.0


def sim_loss(fake, teacher, sample):
    gap = fake - teacher
    return -(gap * (fake - sample)).flatten(1).sum(1) / (gap.square().flatten(1).sum(1) + 1e-6).sqrt()


def moment_matching_loss(sample, auxiliary, teacher):
    return (sample * (auxiliary - teacher).detach()).flatten(1).sum(1)


def auxiliary_loss(sample, auxiliary, teacher):
    return ((sample - auxiliary).square() + (teacher - auxiliary).square()).flatten(1).sum(1)


# Name: eager, ours, which of the three operands are differentiated.
OPS = {
    "sim_loss": (sim_loss, lambda *args: ops.sim_loss(*args, c=1e-3), (0, 1, 2)),
    "moment_matching_loss": (moment_matching_loss, ops.moment_matching_loss, (0,)),
    "moment_matching_auxiliary_loss": (auxiliary_loss, ops.moment_matching_auxiliary_loss, (1,)),
}

WORKLOADS = [
    Workload(
        name, network, shape, lambda shape=shape: [torch.randn(shape) for _ in range(3)], eager, ours, gradients=places, factor=TOLERANCE
    )
    for network, shape in SHAPES.items()
    for name, (eager, ours, places) in OPS.items()
]


def test_speed(case, measure):
    measure(case)
