"""Definitions: the losses of Score Implicit Matching and of moment matching distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype, per_sample, sum_per_sample


def sim_loss(
    fake: Tensor,
    teacher: Tensor,
    sample: Tensor,
    noisy: Tensor | None = None,
    c_skip: float | Tensor | None = None,
    c_out: float | Tensor | None = None,
    weight: float | Tensor = 1.0,
    c: float | Tensor = 0.0,
    distance: str = "pseudo_huber",
) -> tuple[Tensor, Tensor, Tensor]:
    """(-weight * p, |y|, p) for each sample, the last two in float64; p = <y, e> / n, or 0 for n = 0.

    y = fake - teacher, e = fake - sample, n = sqrt(|y|^2 + c^2) or 1. With `noisy`, fake and teacher are raw outputs F of denoisers
    c_skip * noisy + c_out * F.
    """
    dtype = compute_dtype(fake)
    fake, teacher, sample = (t.to(dtype) for t in (fake, teacher, sample))
    gap, denoised = fake - teacher, fake
    if noisy is not None and c_skip is not None and c_out is not None:
        scale = per_sample(c_out, fake)
        gap, denoised = scale * gap, per_sample(c_skip, fake) * noisy.to(dtype) + scale * fake
    product, squared = sum_per_sample(gap * (denoised - sample)), sum_per_sample(gap.square())
    projection = product
    if distance != "l2":
        norm, zero = _root(squared + per_sample(c, product).square())
        projection = torch.where(zero, torch.zeros_like(product), product / torch.where(zero, torch.ones_like(norm), norm))
    return -per_sample(weight, product) * projection, _root(squared)[0].double(), projection.double()


def _root(x: Tensor) -> tuple[Tensor, Tensor]:
    """The square root and where it is zero; its derivative there is 0, where sqrt's would be infinite."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt()), zero


def moment_matching_loss(sample: Tensor, auxiliary: Tensor, teacher: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """weight * <sample, auxiliary - teacher> for each sample, with a gradient to sample alone."""
    dtype = compute_dtype(sample)
    direction = auxiliary.detach().to(dtype) - teacher.detach().to(dtype)
    product = sum_per_sample(sample.to(dtype) * direction)
    return per_sample(weight, product) * product


def moment_matching_auxiliary_loss(sample: Tensor, auxiliary: Tensor, teacher: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """weight * (|sample - auxiliary|^2 + |teacher - auxiliary|^2) for each sample, with a gradient to auxiliary alone."""
    dtype = compute_dtype(sample)
    sample, teacher, auxiliary = sample.detach().to(dtype), teacher.detach().to(dtype), auxiliary.to(dtype)
    squares = sum_per_sample((sample - auxiliary).square() + (teacher - auxiliary).square())
    return per_sample(weight, squares) * squares
