"""Score-optimal schedules (Williams, Campbell, Doucet, Syed, arXiv 2412.07877): costs of intervals, and levels that share them evenly."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import bind
from ._checks import check_choice, check_count, check_device, check_like, check_positive, check_tensor, per_sample, readable

_incremental_cost = bind("incremental_cost")
_integrate_schedule = bind("integrate_schedule")


def incremental_cost(
    x: Tensor,
    raw_low: Tensor,
    raw_high: Tensor,
    sigma_low: float | Tensor,
    sigma_high: float | Tensor,
    *,
    sigma_data: float = 0.5,
) -> Tensor:
    """sigma_low^2 |s(x, sigma_low) - s(x, sigma_high)|^2 for each sample: the work of a Langevin corrector between two noise levels.

    s(x, sigma) = (D(x, sigma) - x) / sigma^2 is the score of a denoiser D under EDM preconditioning (arXiv 2206.00364). It is formed of
    the raw network output F, in which the division by sigma^2 has been cancelled by hand ::

        s(x, sigma) = -x / (sigma^2 + sigma_data^2) + sigma_data / (sigma sqrt(sigma^2 + sigma_data^2)) F(x, sigma)

    From D itself the difference would lose all digits at small sigma. The outputs are subtracted first, then weighted; the weights are
    computed in float64, the rest in float32 (float64 for float64 inputs). Keep F in float32 at low noise: rounded to 16 bits it no
    longer holds the difference. The mean over x ~ p_sigma_high is the corrector-optimised cost of arXiv 2412.07877 with velocity sigma.

    Args:
        x: [B, ...], noisy samples, unscaled; float32, bfloat16, float16 or float64. A layout other than contiguous is copied once.
        raw_low, raw_high: like x; F at this x for sigma_low and for sigma_high.
        sigma_low, sigma_high: the two levels, 0 < sigma_low <= sigma_high: float, 0-d tensor or [B], float32 or float64.
        sigma_data: standard deviation of the data, greater than 0; that of the preconditioning.

    Returns:
        [B], float32 (float64 for float64 inputs). For inference only: arguments must not require grad.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "incremental_cost"
    check_tensor(op, "x", x)
    check_like(op, "raw_low", raw_low, "x", x)
    check_like(op, "raw_high", raw_high, "x", x)
    sigma_data = check_positive(op, "sigma_data", sigma_data)
    # float64, since the levels of a fine grid differ by less than float32 resolves.
    low = per_sample(op, "sigma_low", sigma_low, x, above=0, dtype=torch.float64)
    high = per_sample(op, "sigma_high", sigma_high, x, above=0, dtype=torch.float64)
    if _exceeds(sigma_low, sigma_high, low, high):
        raise ValueError(f"{op}: sigma_low must be at most sigma_high; got {sigma_low} and {sigma_high}")
    return _incremental_cost(x, raw_low, raw_high, low, high, sigma_data)


def _exceeds(sigma_low: float | Tensor, sigma_high: float | Tensor, low: Tensor, high: Tensor) -> bool:
    """Whether some sigma_low is greater than its sigma_high, as far as that is known without waiting for a GPU."""
    if not isinstance(sigma_low, Tensor) and not isinstance(sigma_high, Tensor):
        return sigma_low > sigma_high
    return readable(low) and readable(high) and bool((low > high).any())


def integrate_schedule(sigmas: Tensor, costs: Tensor, num_steps: int, *, interpolation: str = "pchip") -> Tensor:
    """Levels between which the running sum of sqrt(cost) rises by equal amounts: the schedule of constant speed.

    With Lambda_k = sum_(j<k) sqrt(costs_j), the levels are sigma(i / num_steps * Lambda_K) for i = 0 ... num_steps, where sigma(Lambda)
    interpolates the knots (Lambda_k, sigmas_k): algorithm 1 (UpdateSchedule) of arXiv 2412.07877. Costs below 1e-12 of the schedule's
    largest count as that much, so that Lambda can be inverted. Computed in float64.

    Args:
        sigmas: [..., K + 1] with K >= 1, float32 or float64: knots, strictly rising or strictly falling. A layout other than
            contiguous is copied once.
        costs: [..., K] with the same leading dimensions, float32 or float64: the cost of every interval, at least 0, not all 0.
        num_steps: intervals of the result, at least 1.
        interpolation: "pchip", the monotone cubic of Fritsch and Carlson (SciPy's PchipInterpolator), or "linear".

    Returns:
        [..., num_steps + 1] contiguous, sigmas' dtype: from the first knot to the last, both exactly, and strictly monotone between them
        as far as the dtype tells neighbours apart. For inference only: arguments must not require grad.

    Raises:
        TypeError, ValueError: naming the argument that is wrong. Values are checked on CPU alone, since reading them on a GPU would wait
            for it: there a schedule with bad knots or costs comes back as NaN.
    """
    op = "integrate_schedule"
    for name, value in (("sigmas", sigmas), ("costs", costs)):
        check_tensor(op, name, value)
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} must be float32 or float64; got {value.dtype}")
    if sigmas.shape[-1] < 2:
        raise ValueError(f"{op}: sigmas must have at least 2 knots in the last dimension; got shape {tuple(sigmas.shape)}")
    if costs.shape != (*sigmas.shape[:-1], sigmas.shape[-1] - 1):
        expected = (*sigmas.shape[:-1], sigmas.shape[-1] - 1)
        raise ValueError(f"{op}: costs must have shape {expected}, one for every interval of sigmas; got {tuple(costs.shape)}")
    check_device(op, "costs", costs, "sigmas", sigmas)
    check_count(op, "num_steps", num_steps, 1)
    check_choice(op, "interpolation", interpolation, ("pchip", "linear"))
    levels = _integrate_schedule(sigmas, costs, num_steps, interpolation)
    # Bad values come back as NaN, which is cheaper to look for than they are.
    if readable(levels) and bool(torch.isnan(levels[..., 0]).any()):
        _explain(op, sigmas, costs)
    return levels


def _explain(op: str, sigmas: Tensor, costs: Tensor) -> None:
    """Raises the error that says which values are wrong."""
    if not bool(torch.isfinite(sigmas).all()):
        raise ValueError(f"{op}: sigmas must be finite; got {_first(sigmas, ~torch.isfinite(sigmas))}")
    rises = sigmas.diff(dim=-1)
    disorder = torch.where(rises[..., :1] > 0, rises <= 0, rises >= 0)
    if bool(disorder.any()):
        at = disorder.nonzero()[0].tolist()
        left, right = sigmas[(*at[:-1], at[-1])].item(), sigmas[(*at[:-1], at[-1] + 1)].item()
        raise ValueError(f"{op}: sigmas must be strictly monotone; got {left:g} followed by {right:g} at knot {at[-1]}")
    bad = ~torch.isfinite(costs) | (costs < 0)
    if bool(bad.any()):
        raise ValueError(f"{op}: costs must be finite and at least 0; got {_first(costs, bad)}")
    raise ValueError(f"{op}: costs must not all be 0 in a schedule; got none greater than 0")


def _first(values: Tensor, bad: Tensor) -> str:
    at = tuple(bad.nonzero()[0].tolist())
    return f"{values[at].item():g} at index {at if len(at) > 1 else at[0]}"
