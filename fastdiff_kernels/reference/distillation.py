"""Definitions: the losses of Score Implicit Matching and of moment matching distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import compute_dtype, per_sample, sum_per_sample


def sim_loss(
    fake: Tensor,
    teacher: Tensor,
    sample: Tensor,
    weight: float | Tensor = 1.0,
    c: float | Tensor = 0.0,
    distance: str = "pseudo_huber",
) -> Tensor:
    """-weight * <y, e> / n for each sample; y = fake - teacher, e = fake - sample, n = sqrt(|y|^2 + c^2) or 1; 0 / 0 is 0."""
    dtype = compute_dtype(fake)
    fake, teacher, sample = (t.to(dtype) for t in (fake, teacher, sample))
    gap = fake - teacher
    product = sum_per_sample(gap * (fake - sample))
    weight = per_sample(weight, product)
    if distance == "l2":
        return -weight * product
    squared = sum_per_sample(gap.square()) + per_sample(c, product).square()
    # Where the norm is 0 its gradient would be NaN: such samples divide by 1 instead, their product being 0.
    zero = squared == 0
    norm = torch.where(zero, torch.ones_like(squared), squared).sqrt()
    return -weight * torch.where(zero, torch.zeros_like(product), product / norm)


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
