"""Score matching losses on batches of 64 x 64 images and of 512 x 512, and as the training steps that they end in.

"seeded" is LCSS with noise that the kernel draws again, against code that draws it and keeps it for backward. A "step" is the mean over the
batch and its gradient by the score: there the loss's own gradient is one number, which ours takes into the weight, so that the gradients
recorded in forward are left as they are. There is none in float16, where a loss is scaled by more than the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.shapes import GPU
from benchmarks.workloads import Workload
from fastdiff_kernels import ops

_SHAPES_CPU = {"64 px": (64, 3, 64, 64), "512 px": (4, 3, 512, 512)}
# Of which a tensor is 6 MB in bfloat16, and 100 MB.
SHAPES_GPU = {"64 px": (256, 3, 64, 64), "64 px, 100 MB": (4096, 3, 64, 64), "512 px": (64, 3, 512, 512)}
SHAPES = SHAPES_GPU if GPU else _SHAPES_CPU
SIGMA, SEED = 0.5, 7
STEP_DTYPES = (torch.float32, torch.bfloat16)
# torch.compile adds a sample's terms in fewer lanes than eager, which is nearer the truth by up to this factor.
TOLERANCE = 8.0


def denoising_loss(denoised, clean):
    return (denoised - clean).square().flatten(1).sum(1)


def lcss_loss(score, noise):
    return (score * noise).flatten(1).sum(1) / SIGMA + 0.5 * score.square().flatten(1).sum(1)


def drawing_lcss_loss(score):
    return lcss_loss(score, torch.randn_like(score))


def known_lcss_loss(score):
    """With the noise that ours draws."""
    return lcss_loss(score, ops.lcss_noise(score, SEED))


def step(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scalar loss and its gradient by the first operand."""

    def run(network_output: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = network_output.detach().requires_grad_()
            value = loss(leaf, *rest)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

    return run


def mean(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: loss(*args).mean()


def ours_lcss(score, noise):
    return ops.lcss_loss(score, noise, SIGMA)


def ours_seeded(score):
    return ops.lcss_loss(score, SEED, SIGMA)


def ours_mean(score, noise=SEED):
    return ops.lcss_loss(score, noise, SIGMA, weight=1 / score.shape[0]).sum()


def normals(count, shape):
    return lambda: [torch.randn(shape) for _ in range(count)]


def loss_workload(op, network, shape, inputs, eager, ours, **more):
    return Workload(op, network, shape, normals(inputs, shape), eager, ours, gradients=(0,), recorded=True, factor=TOLERANCE, **more)


WORKLOADS = [
    workload
    for network, shape in SHAPES.items()
    for workload in (
        loss_workload("denoising_loss", network, shape, 2, denoising_loss, ops.denoising_loss),
        loss_workload("lcss_loss", network, shape, 2, lcss_loss, ours_lcss),
        loss_workload("lcss_loss seeded", network, shape, 1, drawing_lcss_loss, ours_seeded, checkable=known_lcss_loss),
        Workload(
            "lcss_loss step", network, shape, normals(2, shape), step(mean(lcss_loss)), step(ours_mean),
            factor=TOLERANCE, dtypes=STEP_DTYPES, compiled=False, rivals={"compile": step(mean(torch.compile(lcss_loss, dynamic=False)))},
        ),
        Workload(
            "lcss_loss seeded step", network, shape, normals(1, shape), step(mean(drawing_lcss_loss)), step(ours_mean),
            factor=TOLERANCE, dtypes=STEP_DTYPES, checkable=step(mean(known_lcss_loss)),
            compiled=False, rivals={"compile": step(mean(torch.compile(drawing_lcss_loss, dynamic=False)))},
        ),
    )
]  # fmt: skip


def test_speed(case, measure):
    measure(case)
