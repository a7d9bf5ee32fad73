"""Schedules fitted to a score network (Williams, Campbell, Doucet, Syed, "Score-Optimal Diffusion Schedules", arXiv 2412.07877)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import check_choice, check_count, check_number
from ._fingerprints import of_weights
from ._progress import progress_bar
from .costs import RawDenoiser, check_denoiser, corrector_costs, predictor_costs
from .guidance import check_conditioning
from .interval_costs import FIRST_BATCH, Batches, Costs, IntervalCosts
from .noise_levels import check_range
from .schedule import Schedule, log_grid


def optimize_schedule(
    denoiser: RawDenoiser,
    data: Tensor | Iterable[Tensor | Sequence[Any]],
    num_steps: int,
    *,
    sigma_min: float,
    sigma_max: float,
    knots: int | None = None,
    batch_size: int | None = None,
    cost: str = "corrector",
    rounds: int | None = None,
    tolerance: float = 0.0,
    damping: float | None = None,
    conditioning: Mapping[str, object] | None = None,
    interpolation: str = "pchip",
    seed: int = 0,
    path: str | os.PathLike | None = None,
    progress: bool = False,
) -> Schedule:
    """num_steps levels from sigma_max to sigma_min between which all steps cost the same, and a final 0.

    cost "corrector" is the work of a Langevin corrector of velocity sigma; on a grid of `knots` levels in geometric progression, every
    interval from sigma' down to sigma costs ::

        L = sigma^2 E_{x ~ p_sigma'} |s(x, sigma) - s(x, sigma')|^2

    and the levels are those of equal sum of sqrt(L). The grid is fine and the schedule is read off it: iterating the estimate on the
    coarse schedule itself under-counts the last, longest jumps. Each round adds a batch to every interval.

    cost "predictor" is what an Euler step leaves to be corrected, L = sigma^2 E |s(F(x), sigma) - score of (F moved p_sigma')|^2
    (see `costs.predictor_costs`: many network calls, and a network that is twice differentiable). It is of fourth order in the step, so
    that its root is no length, and moving the levels to equal sums of it overshoots; the fourth root is one. On a fine grid the
    estimate drowns in noise. So each round estimates L on the current levels, from a geometric progression on, and moves them to equal
    sums of L^(1/4), or by `damping` of the way there in ln sigma.

    Args:
        denoiser: offers `.raw(x, sigma, **conditioning)`, the network output F under EDM preconditioning, and `.sigma_data`, as
            `EDMPrecond` does: scores are differenced from F, since (D - x) / sigma^2 loses all digits at small sigma. It should compute
            in float32 there, and be in evaluation mode.
        data: clean samples [N, ...] on the denoiser's device, float32 or float64, drawn batch_size at a time; or an iterable of such
            batches, or of pairs (batch, conditioning), tuples or lists, of any size, one for each interval. An iterable that ends is
            started again.
        num_steps: levels without the final 0; at least 3 with "predictor".
        sigma_min, sigma_max: the last level above 0 and the first, 0 < sigma_min < sigma_max.
        knots: levels of the grid, at least 3, with "corrector" alone; 256 unless given, which place every level within 1 % of the exact
            ones for Gaussian data.
        batch_size: samples per interval and round, with data in a tensor alone; 64 unless given. With "corrector" the network is called
            once for each, on 2 batch_size rows.
        rounds: at most so many; 1 for "corrector" and 12 for "predictor" unless given.
        tolerance: stop when every inner level is known (by its standard error), or, with "predictor", moves by, less than this in ln sigma.
        damping: in (0, 1], with "predictor" alone: the share of their way, in ln sigma, that the levels move in a round; 1 unless given.
        conditioning: keyword arguments of the denoiser, tensors with a row for each datum or scalars; with an iterable, scalars.
        interpolation: of the running sum between the knots, "pchip" or "linear".
        seed: of the noise and of the order in which data are drawn; the same on every device.
        path: a file that holds the estimate, written after every batch; if it is there, the estimate continues from it and ends with the
            same bits as one that was never stopped. Denoiser, data, conditioning and all that the estimate depends on must be the same
            again: a module with other weights, another sigma_data, and a first batch with other samples or conditioning are refused. An
            iterable is asked for its batches from the start and those that were counted are passed over, so that it must give the same
            ones in the same order: give a DataLoader that shuffles a seeded `generator`. A stream in which one of them differs in its
            first datum is refused when the estimate goes on.
        progress: show a progress bar (needs tqdm).

    Returns:
        Schedule, with `.knots` and `.cost` of the grid, the standard errors `.cost_error` and, in ln sigma, `.error` of the levels, and
        `.length` = sum of sqrt(cost).

    Raises:
        TypeError: the denoiser has no `.raw` or `.sigma_data`; an argument of the wrong kind.
        ValueError: an argument out of range, or one that the cost or the data have no use for; no data; conditioning without a row for
            each datum; a file of another estimate, or of another stream; costs not finite or all zero.
    """
    check_denoiser(denoiser)
    check_count(num_steps, "num_steps")
    check_range(sigma_min, sigma_max)
    size = check_count(64 if batch_size is None else batch_size, "batch_size")
    check_count(seed, "seed", 0)
    check_choice(cost, "cost", ("corrector", "predictor"))
    check_choice(interpolation, "interpolation", ("pchip", "linear"))
    if cost == "corrector" and damping is not None:
        raise ValueError(f"damping belongs to cost='predictor' and must be None with 'corrector', whose levels do not move, got {damping}")
    if cost == "predictor" and knots is not None:
        raise ValueError(f"knots belong to cost='corrector' and must be None with 'predictor', whose grid are its levels, got {knots}")
    knots = check_count(256 if knots is None else knots, "knots", 3)
    rounds = check_count({"corrector": 1, "predictor": 12}[cost] if rounds is None else rounds, "rounds")
    check_number(tolerance, "tolerance", minimum=0)
    damping = check_number(1.0 if damping is None else damping, "damping", above=0, maximum=1)
    given = check_conditioning(conditioning, len(data), "conditioning") if isinstance(data, Tensor) else dict(conditioning or {})
    batches = Batches(data, given, size, seed)
    if batch_size is not None and not isinstance(data, Tensor):
        raise ValueError(f"batch_size must be None where data is an iterable, whose batches have sizes of their own, got {batch_size}")
    if cost == "predictor" and num_steps < 3:
        raise ValueError(f"num_steps must be at least 3 with cost='predictor', which moves the levels between the ends; got {num_steps}")
    grid = log_grid(knots if cost == "corrector" else num_steps, sigma_min, sigma_max)
    grid[0], grid[-1] = sigma_max, sigma_min
    settings: dict[str, object] = {"cost": cost, "seed": seed}
    if path is not None:
        moves = (damping, interpolation) if cost == "predictor" else None
        settings |= {"batch_size": size, "damping and interpolation": moves, **_origin(denoiser, data, batches)}
    estimate = IntervalCosts(grid, settings, path)
    if cost == "corrector":
        return _fit_corrector(denoiser, batches, estimate, num_steps, rounds, tolerance, interpolation, progress)
    return _fit_predictor(denoiser, batches, estimate, num_steps, rounds, tolerance, damping, interpolation, progress)


def _origin(denoiser: RawDenoiser, data: object, batches: Batches) -> dict[str, object]:
    """What else must be the same where an estimate goes on."""
    return {
        "data": list(data.shape) if isinstance(data, Tensor) else "a stream",
        FIRST_BATCH: batches.opening(),
        "weights of the denoiser": of_weights(denoiser),
        "sigma_data": float(denoiser.sigma_data),
    }


def _fit_corrector(
    denoiser: RawDenoiser,
    batches: Batches,
    estimate: IntervalCosts,
    num_steps: int,
    rounds: int,
    tolerance: float,
    interpolation: str,
    progress: bool,
) -> Schedule:
    def read_off() -> tuple[Tensor, Tensor]:
        levels = _levels(estimate, num_steps, interpolation)
        return levels, level_errors(estimate.grid, estimate.means, estimate.error(), levels)

    def settled() -> bool:
        return bool((read_off()[1] <= tolerance).all())

    _run_rounds(corrector_costs, denoiser, batches, estimate, rounds, settled, lambda: None, progress)
    levels, error = read_off()
    return _schedule(levels, estimate.grid, estimate.means, estimate.error(), error)


def _run_rounds(
    costs: Costs,
    denoiser: RawDenoiser,
    batches: Batches,
    estimate: IntervalCosts,
    rounds: int,
    settled: Callable[[], bool],
    move: Callable[[], None],
    progress: bool,
) -> None:
    """Gives every interval a batch and calls `move`, again and again until `settled` or `rounds` times, saving after every batch."""
    while estimate.rounds < rounds:
        # What a file holds may be what a run has ended with.
        if estimate.rounds > 0 and estimate.turn == 0 and settled():
            return
        for _ in progress_bar(range(estimate.turn, estimate.intervals), progress, "schedule"):
            estimate.add(batches.evaluate(costs, denoiser, estimate))
            estimate.save()
        estimate.finish_round()
        move()
        estimate.save()


def _levels(estimate: IntervalCosts, num_steps: int, interpolation: str) -> Tensor:
    if num_steps == 1:
        return estimate.grid[:1]
    return ops.integrate_schedule(estimate.grid, estimate.means, num_steps - 1, interpolation=interpolation)


def _schedule(levels: Tensor, grid: Tensor, cost: Tensor, cost_error: Tensor, error: Tensor) -> Schedule:
    zero = levels.new_zeros(1)
    return Schedule(torch.cat((levels, zero)), knots=grid, cost=cost, cost_error=cost_error, error=torch.cat((error, zero)))


def level_errors(grid: Tensor, cost: Tensor, cost_error: Tensor, levels: Tensor) -> Tensor:
    """Standard errors in ln sigma of levels read off `grid`: to first order in those of the intervals' costs, which are independent.

    With R(sigma) the running sum of sqrt(cost) and f = R(level) / R(end), a level moves by (dR(level) - f dR(end)) / (dR / d ln sigma).
    """
    width = cost.clamp(min=1e-12 * float(cost.max())).sqrt()
    variance = torch.cat((cost.new_zeros(1), (cost_error / (2 * width)).square().cumsum(0)))  # [K + 1]
    running = torch.cat((cost.new_zeros(1), width.cumsum(0)))
    depth, at = -grid.log(), -levels.log()  # both rise
    interval = (torch.searchsorted(depth, at, right=True) - 1).clamp(0, len(cost) - 1)
    share = ((at - depth[interval]) / (depth[interval + 1] - depth[interval])).clamp(0, 1)
    known = variance[interval] + share * (variance[interval + 1] - variance[interval])
    fraction = (running[interval] + share * width[interval]) / running[-1]
    spread = ((1 - fraction).square() * known + fraction.square() * (variance[-1] - known)).sqrt()
    speed = width[interval] / (depth[interval + 1] - depth[interval])
    error = (spread / speed).nan_to_num(nan=math.inf, posinf=math.inf)  # of single samples nothing is known
    error[0] = 0.0
    if len(error) > 1:
        error[-1] = 0.0
    return error


def _fit_predictor(
    denoiser: RawDenoiser,
    batches: Batches,
    estimate: IntervalCosts,
    num_steps: int,
    rounds: int,
    tolerance: float,
    damping: float,
    interpolation: str,
    progress: bool,
) -> Schedule:
    def settled() -> bool:
        return float((estimate.grid.log() - estimate.last_grid.log()).abs().max()) <= tolerance

    def move() -> None:
        logs, target = estimate.grid.log(), _equal_fourth_roots(estimate, num_steps, interpolation)
        inner = torch.lerp(logs, target.log(), damping)[1:-1].exp()
        estimate.move(torch.cat((estimate.grid[:1], inner, estimate.grid[-1:])))

    _run_rounds(predictor_costs, denoiser, batches, estimate, rounds, settled, move, progress)
    grid, cost = estimate.last_grid, estimate.last_cost.clamp(min=0)
    # Of the square roots, whose roots the levels are spaced by.
    root_error = estimate.last_error / (2 * cost.clamp(min=1e-12 * float(cost.max())).sqrt())
    error = level_errors(grid, cost.sqrt(), root_error, estimate.grid)
    return _schedule(estimate.grid, grid, cost, estimate.last_error, error)


def _equal_fourth_roots(estimate: IntervalCosts, num_steps: int, interpolation: str) -> Tensor:
    # An estimate from products may fall below 0 where the cost is small.
    return ops.integrate_schedule(estimate.grid, estimate.means.clamp(min=0).sqrt(), num_steps - 1, interpolation=interpolation)
