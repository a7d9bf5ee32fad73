"""Losses of Score Implicit Matching (SIM; Luo et al., arXiv 2410.16794) and of moment matching (Salimans et al., arXiv 2406.04103)."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import bind
from ._checks import check_choice, check_companion_dtype, check_device, check_like, check_tensor, per_sample

_sim_loss = bind("sim_loss")
_moment_matching_loss = bind("moment_matching_loss")
_moment_matching_auxiliary_loss = bind("moment_matching_auxiliary_loss")

DISTANCES = ("pseudo_huber", "l2")


def sim_loss(
    fake: Tensor,
    teacher: Tensor,
    sample: Tensor,
    *,
    weight: float | Tensor = 1.0,
    c: float | Tensor = 0.0,
    distance: str = "pseudo_huber",
    raw: bool = False,
    noisy: Tensor | None = None,
    c_skip: float | Tensor | None = None,
    c_out: float | Tensor | None = None,
    return_gap: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """-weight * <y, e> / n for each sample, with y = fake - teacher and e = fake - sample: the generator's loss of SIM.

    n = sqrt(|y|^2 + c^2) for "pseudo_huber", 1 for "l2"; norms and products run over all elements of a sample, and 0 / 0 is 0 with zero
    gradients. fake and teacher are two denoisers' outputs at x_t = alpha * sample + sigma * noise, their parameters frozen; the gradients
    to them belong into the loss, which is a biased one without the networks' pullbacks to x_t. The value itself has mean 0 for an exact
    fake score and says nothing about convergence; the gap |y| does.

    SIM's d(s) = sqrt(|s|^2 + c_s^2) - c_s on scores with time weight w is c = c_s * sigma^2 / alpha, weight = w * alpha / sigma^2.

    Gradients (per sample, G the incoming one):
        sample:  G weight y / n
        teacher: G weight (e / n - <y, e> y / n^3);  for "l2" without the second term
        fake:    minus the sum of the two

    raw=True takes the networks' raw outputs F of denoisers D = c_skip * noisy + c_out * F. Then y = c_out * (F_fake - F_teacher), in which
    c_skip * noisy has cancelled exactly, and e = c_skip * noisy + c_out * F_fake - sample; all in float32, nothing stored in between. The
    gradients to fake and teacher are those above times c_out, that to noisy is -c_skip times that to sample.

    What 16 bits cost: y is a small difference of values that were rounded when they were stored. Measured for EDM's preconditioning
    (sigma_data 0.5, F of variance 1, the two 0.1 apart), the relative error of y in bfloat16 is

        sigma               0.02    0.1     0.5     2
        denoised outputs    0.57    0.12    0.033   0.024
        raw outputs         0.024   0.024   0.024   0.024

    and ten times that where they are 0.01 apart; float16 loses an eighth of it. Only networks with a float32 head lose nothing.

    Args:
        fake: [B, ...], the online denoiser's output; float32, bfloat16, float16 or float64. A layout other than contiguous is copied once.
        teacher: like fake.
        sample: like fake, or float32 beside 16 bits.
        weight: finite constant: float, 0-d tensor or [B], float32 or float64.
        c: at least 0, of the forms of weight. It does not enter "l2".
        distance: "pseudo_huber" or "l2".
        raw: whether fake and teacher are raw outputs, which need the next three:
        noisy: x_t, like sample.
        c_skip, c_out: the preconditioning at x_t's noise level, finite constants of the forms of weight.
        return_gap: also return |y| [B], without a gradient.

    Returns:
        [B], float32 (float64 for float64 inputs). Differentiable in fake, teacher, sample and noisy.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; weight, c, c_skip and c_out must not require grad.
    """
    op = "sim_loss"
    check_tensor(op, "fake", fake)
    check_like(op, "teacher", teacher, "fake", fake)
    _check_sample(op, sample, fake)
    check_choice(op, "distance", distance, DISTANCES)
    preconditioning = _preconditioning(op, raw, noisy, c_skip, c_out, sample, fake)
    constants = per_sample(op, "weight", weight, fake), per_sample(op, "c", c, fake, at_least=0)
    loss, gap, _ = _sim_loss(fake, teacher, sample, *preconditioning, *constants, distance)
    return (loss, gap.to(loss.dtype)) if return_gap else loss


def _check_sample(op: str, sample: object, fake: Tensor) -> None:
    sample = check_tensor(op, "sample", sample, min_dims=0)
    if sample.shape != fake.shape:
        raise ValueError(f"{op}: sample must have the shape of fake, {tuple(fake.shape)}; got {tuple(sample.shape)}")
    check_companion_dtype(op, "sample", sample, "fake", fake)
    check_device(op, "sample", sample, "fake", fake)


def _preconditioning(
    op: str,
    raw: bool,
    noisy: Tensor | None,
    c_skip: float | Tensor | None,
    c_out: float | Tensor | None,
    sample: Tensor,
    fake: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    for name, value in (("noisy", noisy), ("c_skip", c_skip), ("c_out", c_out)):
        if raw and value is None:
            raise ValueError(f"{op}: raw=True needs {name}, which is None")
        if not raw and value is not None:
            raise ValueError(f"{op}: {name} belongs to raw=True and must be None beside denoised outputs")
    if noisy is None or c_skip is None or c_out is None:
        return None, None, None
    check_like(op, "noisy", noisy, "sample", sample)
    return noisy, per_sample(op, "c_skip", c_skip, fake), per_sample(op, "c_out", c_out, fake)


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
