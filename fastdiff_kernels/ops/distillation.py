"""Losses of Score Implicit Matching (SIM; Luo et al., arXiv 2410.16794) and of moment matching (Salimans et al., arXiv 2406.04103)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch  # noqa: F401  (registers the ops)
from ._checks import check_choice, check_like, check_tensor, per_sample

_sim_loss = torch.ops.fastdiff.sim_loss.default
_moment_matching_loss = torch.ops.fastdiff.moment_matching_loss.default
_moment_matching_auxiliary_loss = torch.ops.fastdiff.moment_matching_auxiliary_loss.default

DISTANCES = ("pseudo_huber", "l2")


def sim_loss(
    fake: Tensor,
    teacher: Tensor,
    sample: Tensor,
    *,
    weight: float | Tensor = 1.0,
    c: float | Tensor = 0.0,
    distance: str = "pseudo_huber",
) -> Tensor:
    """-weight * <y, e> / n for each sample, with y = fake - teacher and e = fake - sample: the generator's loss of SIM.

    n = sqrt(|y|^2 + c^2) for "pseudo_huber", 1 for "l2"; norms and products run over all elements of a sample, and 0 / 0 is 0 with zero
    gradients. fake and teacher are two denoisers' outputs at x_t = alpha * sample + sigma * noise, their parameters frozen; the gradients
    to them belong into the loss, which is a biased one without the networks' pullbacks to x_t. The value itself has mean 0 for an exact
    fake score and says nothing about convergence.

    SIM's d(s) = sqrt(|s|^2 + c_s^2) - c_s on scores with time weight w is c = c_s * sigma^2 / alpha, weight = w * alpha / sigma^2.

    Gradients (per sample, G the incoming one):
        sample:  G weight y / n
        teacher: G weight (e / n - <y, e> y / n^3);  for "l2" without the second term
        fake:    minus the sum of the two

    Args:
        fake: [B, ...], the online denoiser's output; float32, bfloat16, float16 or float64. A layout other than contiguous is copied once.
            16-bit inputs carry the rounding of their storage into y: prefer float32 heads where the two denoisers are close.
        teacher, sample: like fake.
        weight: finite constant: float, 0-d tensor or [B], float32 or float64.
        c: at least 0, of the forms of weight. It does not enter "l2".
        distance: "pseudo_huber" or "l2".

    Returns:
        [B], float32 (float64 for float64 inputs). Differentiable in fake, teacher and sample.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; weight and c must not require grad.
    """
    op = "sim_loss"
    check_tensor(op, "fake", fake)
    check_like(op, "teacher", teacher, "fake", fake)
    check_like(op, "sample", sample, "fake", fake)
    check_choice(op, "distance", distance, DISTANCES)
    return _sim_loss(fake, teacher, sample, per_sample(op, "weight", weight, fake), per_sample(op, "c", c, fake, at_least=0), distance)


def moment_matching_loss(sample: Tensor, auxiliary: Tensor, teacher: Tensor, *, weight: float | Tensor = 1.0) -> Tensor:
    """weight * <sample, sg[auxiliary - teacher]> for each sample: the generator's loss of moment matching (arXiv 2406.04103, Algorithm 2).

    Its gradient, weight * (auxiliary - teacher), goes to sample alone. The value can have either sign and is only a diagnostic.

    Args:
        sample: [B, ...], the generator's output; float32, bfloat16, float16 or float64. A layout other than contiguous is copied once.
        auxiliary: like sample: the auxiliary denoiser's output at z_s; gets no gradient.
        teacher: like sample: the teacher's output at z_s; gets no gradient.
        weight: finite constant: float, 0-d tensor or [B], float32 or float64.

    Returns:
        [B], float32 (float64 for float64 inputs). Differentiable in sample.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; weight must not require grad.
    """
    op = "moment_matching_loss"
    _check_three(op, sample, auxiliary, teacher)
    return _moment_matching_loss(sample, auxiliary, teacher, per_sample(op, "weight", weight, sample))


def moment_matching_auxiliary_loss(sample: Tensor, auxiliary: Tensor, teacher: Tensor, *, weight: float | Tensor = 1.0) -> Tensor:
    """weight * (|sample - auxiliary|^2 + |teacher - auxiliary|^2) for each sample: the auxiliary denoiser's (arXiv 2406.04103, Alg. 2).

    Its gradient, 2 * weight * (2 * auxiliary - sample - teacher), goes to auxiliary alone.

    Args:
        sample: [B, ...], the generator's output; gets no gradient; float32, bfloat16, float16 or float64. A layout other than contiguous is
            copied once.
        auxiliary: like sample: the auxiliary denoiser's output at z_s.
        teacher: like sample: the teacher's output at z_s; gets no gradient.
        weight: finite constant: float, 0-d tensor or [B], float32 or float64.

    Returns:
        [B], float32 (float64 for float64 inputs). Differentiable in auxiliary.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; weight must not require grad.
    """
    op = "moment_matching_auxiliary_loss"
    _check_three(op, sample, auxiliary, teacher)
    return _moment_matching_auxiliary_loss(sample, auxiliary, teacher, per_sample(op, "weight", weight, sample))


def _check_three(op: str, sample: Tensor, auxiliary: Tensor, teacher: Tensor) -> None:
    check_tensor(op, "sample", sample)
    check_like(op, "auxiliary", auxiliary, "sample", sample)
    check_like(op, "teacher", teacher, "sample", sample)
