"""Criteria for reusing a network's output (AdaptiveDiffusion; Ye, Yuan et al., arXiv 2410.09873), and the solver step that ends in one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._dispatch import bind
from ..reference.skipping import STATE_WIDTH
from ._checks import check_choice, check_count, check_device, check_like, check_tensor, readable

_third_order_skip = bind("third_order_skip")
_third_order_difference = bind("third_order_difference")
_solver_step = bind("solver_step")

# The scalars of a solver step, in the order in which they are checked.
_NUMBERS = ("sigma", "sigma_next", "guidance", "at", "reuse_at", "previous_weight", *(f"scales[{i}]" for i in range(4)), "threshold")
_NUMBER_TYPES = frozenset((int, float))


def third_order_skip(d0: Tensor, d1: Tensor, d2: Tensor, threshold: float | Tensor) -> Tensor:
    """|(d0 + d2) / 2 - d1| <= threshold * d1, elementwise: whether the next network call can be skipped.

    d_k = mean |X_k - X_(k-1)| are the last three mean changes of the latent; where they are all but linear in k the network's output
    is reused (arXiv 2410.09873; the authors' code differences the means, not the latents). The answer stays on the device. Compared in
    float32 (float64 for float64 changes); a NaN gives False.

    Args:
        d0, d1, d2: changes of one shape (0-d, [B] or any), dtype and device, the newest last; float32, bfloat16, float16 or float64. A
            layout other than contiguous is copied once.
        threshold: at least 0: float, or a tensor 0-d or [1], float32 or float64. A float64 one is rounded to float32 beside narrower
            changes.

    Returns:
        bool, the shape of d0, contiguous. For inference only: arguments must not require grad.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "third_order_skip"
    check_tensor(op, "d0", d0, min_dims=0)
    check_like(op, "d1", d1, "d0", d0)
    check_like(op, "d2", d2, "d0", d0)
    return _third_order_skip(d0, d1, d2, _threshold(op, threshold, d0))


def third_order_difference(x0: Tensor, x1: Tensor, x2: Tensor, x3: Tensor) -> tuple[Tensor, Tensor]:
    """Means over each sample of |x3 - 3 x2 + 3 x1 - x0| and of |x3 - x2|, in one pass over four successive latents.

    The vector form of the criterion of arXiv 2410.09873: the network is called where the first is larger than a threshold times the
    second. Differences and sums are float32 (float64 for float64 latents), whatever the latents' dtype.

    Args:
        x0, x1, x2, x3: [B, ...], one shape, dtype and device, the newest last; float32, bfloat16, float16 or float64. A layout other
            than contiguous is copied once.

    Returns:
        Two tensors [B], float32 (float64 for float64 latents); NaN for samples without elements. For inference only: arguments must not
        require grad.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "third_order_difference"
    check_tensor(op, "x0", x0)
    for name, x in (("x1", x1), ("x2", x2), ("x3", x3)):
        check_like(op, name, x, "x0", x0)
    return _third_order_difference(x0, x1, x2, x3)


class SolverStep(NamedTuple):
    """What `solver_step` returns; what was not asked for has no elements."""

    x_next: Tensor
    noise: Tensor
    denoised: Tensor
    state: Tensor


def solver_step(
    x: Tensor,
    sigma: float,
    sigma_next: float,
    *,
    denoised: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    rows: Tensor | None = None,
    newest: Tensor | None = None,
    older: Tensor | None = None,
    at: float | None = None,
    reuse_at: float | None = None,
    previous: Tensor | None = None,
    previous_weight: float = 0.0,
    point: Tensor | None = None,
    state: Tensor | None = None,
    mode: str = "none",
    threshold: float = 0.01,
    max_skip: int = 4,
    before: tuple[Tensor, Tensor] | None = None,
    scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    keep_noise: bool = False,
    keep_denoised: bool = False,
) -> SolverStep:
    """One step of a solver of dx/dsigma = (x - D) / sigma and the decision whether the next one needs the network, in one pass over x.

    A sample's prediction is computed or reused ::

        computed  D = uncond + guidance (denoised - uncond), or denoised without uncond;  e = (x - D) / sigma
        reused    e = newest + (reuse_at - at_newest) / (at_newest - at_older) (newest - older), or newest;  D = x - sigma e

    and the step is Euler's from D' = D + previous_weight (D - previous), which makes it DPM-Solver++(2M) with the right weight ::

        x_next = x + (sigma_next - sigma) (x - D') / sigma

    or, for a computed sample with `point`, the second half of Heun's: `denoised` was then predicted at the Euler step `point` ::

        e = (point - D) / sigma_next;  x_next = x + (point - x) / 2 + (sigma_next - sigma) e / 2

    The decision is taken where the means are, so that nothing waits for the host. With X_k the latent after k steps and the means over
    all of the batch ([1, 9] state) or over each sample ([B, 9]), mode "official" reuses in the next step iff ::

        d_k = mean |X_k - X_(k-1)|:   |(d_k + d_(k-2)) / 2 - d_(k-1)| <= threshold d_(k-1)

    from k = 4 on, at most max_skip times in a row once five decisions have been taken (arXiv 2410.09873 as its authors' code has it);
    mode "tensor" iff mean |X_k - 3 X_(k-1) + 3 X_(k-2) - X_(k-3)| <= threshold mean |X_k - X_(k-1)|, at most max_skip times in a row.
    Differences are formed before x_next is rounded, in float32 (float64 for float64 latents), and decisions in float64.

    Args:
        x: [B, ...], float32, bfloat16, float16 or float64. Here and below a layout other than contiguous is copied once.
        sigma, sigma_next: levels of x, > 0, and of x_next, >= 0.
        denoised, uncond: like x, or [M, ...] with `rows`: the denoiser's output with the condition and without it.
        guidance: finite; must be left at 1 without uncond.
        rows: int64 [B]: the row of `denoised` that belongs to a sample, negative where the sample reuses. Without it all samples compute,
            or, without `denoised`, all reuse.
        newest, older: like x: the last noise predictions; `older` only where predictions are to be continued linearly. A sample
            with a single one so far (by its state) reuses that as it is.
        at: where on the solver's axis e was computed, stored with keep_noise; sigma unless given. reuse_at: where a reused one is wanted;
            `at` unless given.
        previous: like x: D of the last step; previous_weight must be left at 0 without it. point: like x. Not both.
        state: float64 [1, 9] or [B, 9], zeros before the first step. Columns: completed steps, reuses in a row, 1 where the next step
            reuses, noise predictions stored (0 to 2), `at` of the newest and of the older, and the last three d, the newest last.
        mode: "official", "tensor", or "none", which takes no decision and counts no step.
        threshold: >= 0. max_skip: >= 1.
        before: (X_(k-2), X_(k-3)) for mode "tensor", like x; None while there are not that many, which decides for computing.
        scales: what x_next, x and the two of `before` are multiplied by before they are differenced: 1 / sqrt(1 + sigma^2) looks at the
            latents of a variance-preserving process.
        keep_noise, keep_denoised: whether e and D are returned; a sample that reused has its newest for e.

    Returns:
        SolverStep: x_next, like x; noise e and denoised D, like x, or without elements where not asked for; the new state, float64, without
        elements where none was given. For inference only: arguments must not require grad.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "solver_step"
    check_tensor(op, "x", x)
    at = sigma if at is None else at
    try:
        levels = (sigma, sigma_next, guidance, at, at if reuse_at is None else reuse_at, previous_weight, *scales)
    except TypeError:
        raise TypeError(f"{op}: scales must be 4 numbers; got {type(scales).__name__}") from None
    if len(levels) != 10:
        raise ValueError(f"{op}: scales must be 4 numbers; got {len(levels) - 6}")
    _check_numbers(op, (*levels, threshold))
    if sigma <= 0:
        raise ValueError(f"{op}: sigma must be finite and greater than 0; got {sigma}")
    if sigma_next < 0:
        raise ValueError(f"{op}: sigma_next must be finite and at least 0; got {sigma_next}")
    older1, older0 = (None, None) if before is None else _check_before(op, before)
    _check_predictions(op, x, denoised, uncond, guidance, rows, newest, older)
    if not (previous is point is older1 is older0 is None):
        _check_alike(op, x, (("previous", previous), ("point", point), ("before[0]", older1), ("before[1]", older0)))
    if point is not None and (previous is not None or denoised is None or sigma_next == 0):
        raise ValueError(f"{op}: point needs denoised and sigma_next > 0, and excludes previous")
    if previous is None and previous_weight != 0:
        raise ValueError(f"{op}: previous_weight needs previous, which is None; got previous_weight = {previous_weight}")
    _check_rule(op, x, state, mode, threshold, max_skip)
    if type(keep_noise) is not bool or type(keep_denoised) is not bool:
        name, keep = ("keep_denoised", keep_denoised) if type(keep_noise) is bool else ("keep_noise", keep_noise)
        raise TypeError(f"{op}: {name} must be a bool; got {type(keep).__name__}")
    if keep_noise and denoised is None:
        raise ValueError(f"{op}: keep_noise needs denoised, which is None; a reused prediction is not a new one")
    tensors = (x, denoised, uncond, rows, newest, older, previous, point, older1, older0, state)
    return SolverStep(*_solver_step(*tensors, *levels, mode, threshold, max_skip, keep_noise, keep_denoised))


def _check_numbers(op: str, numbers: Sequence[float]) -> None:
    # All at once costs a fifth of a look at each: no term of a finite sum is anything else. A compiler cannot trace math.isfinite.
    if _NUMBER_TYPES.issuperset(map(type, numbers)) and -math.inf < sum(numbers) < math.inf:
        return
    for name, value in zip(_NUMBERS, numbers, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}")
        if not -math.inf < value < math.inf:
            raise ValueError(f"{op}: {name} must be finite; got {value}")


def _check_before(op: str, before: Sequence[Tensor]) -> Sequence[Tensor]:
    if not isinstance(before, (tuple, list)) or len(before) != 2 or before[0] is None or before[1] is None:
        came = [type(x).__name__ for x in before] if isinstance(before, (tuple, list)) else type(before).__name__
        raise TypeError(f"{op}: before must be two tensors; got {came}")
    return before


def _check_predictions(
    op: str,
    x: Tensor,
    denoised: Tensor | None,
    uncond: Tensor | None,
    guidance: float,
    rows: Tensor | None,
    newest: Tensor | None,
    older: Tensor | None,
) -> None:
    if denoised is None:
        if newest is None:
            raise ValueError(f"{op}: needs denoised, or newest to reuse; got neither")
        if uncond is not None or rows is not None:
            raise ValueError(f"{op}: {'rows' if uncond is None else 'uncond'} needs denoised, which is None")
    elif rows is not None:
        _check_rows(op, x, denoised, rows, newest)
    if uncond is not None and denoised is not None:
        check_like(op, "uncond", uncond, "denoised", denoised)
    elif guidance != 1:
        raise ValueError(f"{op}: guidance needs uncond, which is None; got guidance = {guidance}")
    _check_alike(op, x, (("denoised", denoised if rows is None else None), ("newest", newest), ("older", older)))
    if older is not None and newest is None:
        raise ValueError(f"{op}: older needs newest, which is None")


def _check_alike(op: str, x: Tensor, others: Sequence[tuple[str, Tensor | None]]) -> None:
    shape, dtype, device = x.shape, x.dtype, x.device
    for name, like in others:
        if like is None or (isinstance(like, Tensor) and like.dtype is dtype and like.shape == shape and like.device == device):
            continue
        check_like(op, name, like, "x", x)


def _check_rows(op: str, x: Tensor, denoised: Tensor, rows: Tensor, newest: Tensor | None) -> None:
    check_tensor(op, "denoised", denoised)
    if denoised.shape[1:] != x.shape[1:]:
        raise ValueError(f"{op}: denoised must have samples of shape {tuple(x.shape[1:])}; got {tuple(denoised.shape)}")
    if denoised.dtype != x.dtype:
        raise TypeError(f"{op}: denoised must have the dtype of x, {x.dtype}; got {denoised.dtype}")
    check_device(op, "denoised", denoised, "x", x)
    if not isinstance(rows, Tensor):
        raise TypeError(f"{op}: rows must be a tensor; got {type(rows).__name__}")
    if rows.dtype != torch.int64 or rows.shape != x.shape[:1]:
        raise ValueError(f"{op}: rows must be int64 of shape ({x.shape[0]},); got {rows.dtype}, {tuple(rows.shape)}")
    check_device(op, "rows", rows, "x", x)
    if newest is None:
        raise ValueError(f"{op}: rows needs newest, which is None")
    known = rows.numel() > 0 and readable(rows)
    if known and int(rows.max()) >= denoised.shape[0]:
        raise ValueError(f"{op}: rows must be below the {denoised.shape[0]} rows of denoised; got {int(rows.max())}")


def _check_rule(op: str, x: Tensor, state: Tensor | None, mode: str, threshold: float, max_skip: int) -> None:
    check_choice(op, "mode", mode, ("official", "tensor", "none"))
    _check_threshold(op, threshold)
    check_count(op, "max_skip", max_skip, 1)
    if state is None:
        if mode != "none":
            raise ValueError(f"{op}: mode {mode!r} needs state, which is None")
        return
    if not isinstance(state, Tensor):
        raise TypeError(f"{op}: state must be a tensor; got {type(state).__name__}")
    if state.dtype != torch.float64:
        raise TypeError(f"{op}: state must be float64; got {state.dtype}")
    if tuple(state.shape) not in ((1, STATE_WIDTH), (x.shape[0], STATE_WIDTH)):
        raise ValueError(f"{op}: state must have shape (1, {STATE_WIDTH}) or ({x.shape[0]}, {STATE_WIDTH}); got {tuple(state.shape)}")
    check_device(op, "state", state, "x", x)


def _threshold(op: str, threshold: float | Tensor, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(threshold, Tensor):
        if threshold.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: threshold must be float32 or float64; got {threshold.dtype}")
        if threshold.numel() != 1 or threshold.dim() > 1:
            raise ValueError(f"{op}: threshold must be a float or a tensor 0-d or of shape (1,); got shape {tuple(threshold.shape)}")
        if threshold.device != like.device:
            raise ValueError(f"{op}: threshold must be on the device of d0, {like.device}; got {threshold.device}")
        if readable(threshold):
            _check_threshold(op, float(threshold.detach()))
        return threshold.reshape(1).to(dtype)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"{op}: threshold must be a float or a tensor; got {type(threshold).__name__}")
    _check_threshold(op, float(threshold))
    return torch.full((1,), float(threshold), dtype=dtype, device=like.device)


def _check_threshold(op: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{op}: threshold must be finite and at least 0; got {value}")
