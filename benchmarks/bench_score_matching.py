"""Score matching losses on a batch of 64 x 64 images and on four of 512 x 512, and as the training steps that they end in.

"seeded" is LCSS with noise that the kernel draws again, against code that draws it and keeps it for backward. A "step" is the mean over the
batch and its gradient by the score: there the loss's own gradient is one number, which ours takes into the weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.workloads import Workload
from fastdiff_kernels import ops

SHAPES = {"64 px": (64, 3, 64, 64), "512 px": (4, 3, 512, 512)}
SIGMA, SEED = 0.5, 7
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


WORKLOADS = [
    workload
    for network, shape in SHAPES.items()
    for workload in (
        Workload("denoising_loss", network, shape, normals(2, shape), denoising_loss, ops.denoising_loss, gradients=(0,), factor=TOLERANCE),
        Workload("lcss_loss", network, shape, normals(2, shape), lcss_loss, ours_lcss, gradients=(0,), factor=TOLERANCE),
        Workload(
            "lcss_loss seeded", network, shape, normals(1, shape), drawing_lcss_loss, ours_seeded,
            gradients=(0,), factor=TOLERANCE, checkable=known_lcss_loss,
        ),
        Workload(
            "lcss_loss step", network, shape, normals(2, shape), step(mean(lcss_loss)), step(ours_mean),
            factor=TOLERANCE, compiled=False, rivals={"compile": step(mean(torch.compile(lcss_loss, dynamic=False)))},
        ),
        Workload(
            "lcss_loss seeded step", network, shape, normals(1, shape), step(mean(drawing_lcss_loss)), step(ours_mean),
            factor=TOLERANCE, checkable=step(mean(known_lcss_loss)),
            compiled=False, rivals={"compile": step(mean(torch.compile(drawing_lcss_loss, dynamic=False)))},
        ),
    )
]  # fmt: skip


def test_speed(case, measure):
    measure(case)
