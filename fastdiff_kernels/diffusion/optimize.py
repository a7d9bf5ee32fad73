"""Schedules fitted to a score network (Williams, Campbell, Doucet, Syed, "Score-Optimal Diffusion Schedules", arXiv 2412.07877)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .. import ops
from .._checks import check_count, check_positive
from ._checks import check_samples
from ._progress import progress_bar
from .guidance import check_conditioning, take_rows
from .noise_levels import check_range
from .schedule import Schedule, log_grid


class RawDenoiser(Protocol):
    """What `optimize_schedule` asks of a denoiser; `EDMPrecond` is one."""

    sigma_data: float

    def raw(self, x: Tensor, sigma: Tensor, **conditioning: object) -> Tensor:
        """The network output F under EDM preconditioning, at the unscaled x."""


@torch.no_grad()
def optimize_schedule(
    denoiser: RawDenoiser,
    data: Tensor,
    num_steps: int,
    *,
    sigma_min: float,
    sigma_max: float,
    knots: int = 256,
    batch_size: int = 64,
    cost: str = "corrector",
    conditioning: Mapping[str, object] | None = None,
    interpolation: str = "pchip",
    seed: int = 0,
    progress: bool = False,
) -> Schedule:
    """num_steps levels from sigma_max to sigma_min between which the score changes equally much, and a final 0.

    On a grid of `knots` levels in geometric progression, every interval from sigma' down to sigma costs ::

        L = sigma^2 E_{x ~ p_sigma'} |s(x, sigma) - s(x, sigma')|^2

    (the work of a Langevin corrector of velocity sigma), and the levels are those of equal sum of sqrt(L). The grid is fine and the
    schedule is read off it: iterating the estimate on the coarse schedule itself under-counts the last, longest jumps.

    Args:
        denoiser: offers `.raw(x, sigma, **conditioning)`, the network output F under EDM preconditioning, and `.sigma_data`, as
            `EDMPrecond` does: scores are differenced from F, since (D - x) / sigma^2 loses all digits at small sigma. It should compute
            in float32 there, and be in evaluation mode.
        data: clean samples [N, ...] on the denoiser's device, float32 or float64.
        num_steps: levels without the final 0.
        knots: levels of the grid, at least 3; 256 place every level within 1 % of the exact ones for Gaussian data.
        batch_size: samples per interval. The network is called once for each interval, on 2 batch_size rows.
        cost: "corrector", the cost above; it is the only one.
        conditioning: keyword arguments of the denoiser, tensors with a row for each datum or scalars.
        interpolation: of the running sum between the knots, "pchip" or "linear".
        seed: of the noise and of the order in which data are drawn; the same on every device.
        progress: show a progress bar (needs tqdm).

    Returns:
        Schedule, with `.knots` and `.cost` of the grid and `.length` = sum of sqrt(cost).

    Raises:
        TypeError: the denoiser has no `.raw` or `.sigma_data`; an argument of the wrong kind.
        ValueError: an argument out of range; no data; conditioning without a row for each datum; costs not finite or all zero.
    """
    _check_denoiser(denoiser)
    _check_data(data)
    check_count(num_steps, "num_steps")
    check_range(sigma_min, sigma_max)
    check_count(knots, "knots", 3)
    check_count(batch_size, "batch_size")
    check_count(seed, "seed", 0)
    if cost != "corrector":
        raise ValueError(f"cost must be 'corrector', got {cost!r}")
    if interpolation not in ("pchip", "linear"):
        raise ValueError(f"interpolation must be 'pchip' or 'linear', got {interpolation!r}")
    given = check_conditioning(conditioning, data.shape[0], "conditioning")

    grid = log_grid(knots, sigma_min, sigma_max)
    grid[0], grid[-1] = sigma_max, sigma_min
    costs = _estimate_costs(denoiser, data, given, grid, batch_size, seed, progress)
    levels = ops.integrate_schedule(grid, costs, num_steps - 1, interpolation=interpolation) if num_steps > 1 else grid[:1]
    return Schedule(torch.cat((levels, levels.new_zeros(1))), knots=grid, cost=costs)


def _estimate_costs(
    denoiser: RawDenoiser,
    data: Tensor,
    conditioning: dict[str, object],
    grid: Tensor,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Tensor:
    # Fresh data and noise for every interval: errors average out along the running sum, where common ones would add up.
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    costs = torch.zeros(len(grid) - 1, dtype=torch.float64, device=data.device)
    for index, (high, low) in enumerate(progress_bar(list(pairwise(grid.tolist())), progress, "schedule")):
        first = index * batch_size
        rows = order[torch.arange(first, first + batch_size) % len(data)].to(data.device)
        clean, given = data[rows], take_rows(conditioning, rows)
        costs[index] = _interval_costs(denoiser, clean, given, low, high, seed, first).mean()
    return _check_costs(costs.cpu(), grid)


def _check_costs(costs: Tensor, grid: Tensor) -> Tensor:
    broken = (~torch.isfinite(costs)).nonzero()
    if len(broken):
        at = int(broken[0])
        raise ValueError(f"denoiser.raw gives a cost of {costs[at]:g} between sigma {grid[at]:g} and {grid[at + 1]:g}")
    return costs


def _interval_costs(
    denoiser: RawDenoiser, clean: Tensor, conditioning: dict[str, object], low: float, high: float, seed: int, offset: int
) -> Tensor:
    x = ops.lcss_perturb(clean, high, seed, offset=offset)
    dtype = torch.promote_types(x.dtype, torch.float32)
    sigma = torch.tensor([low, high], dtype=dtype, device=x.device).repeat_interleave(len(x))  # [2 B]
    twice = {key: torch.cat((value, value)) if isinstance(value, Tensor) else value for key, value in conditioning.items()}
    raw_low, raw_high = denoiser.raw(torch.cat((x, x)), sigma, **twice).chunk(2)
    return ops.incremental_cost(x, raw_low, raw_high, low, high, sigma_data=denoiser.sigma_data)  # [B]


def _check_denoiser(denoiser: RawDenoiser) -> None:
    for attribute in ("raw", "sigma_data"):
        if not hasattr(denoiser, attribute):
            raise TypeError(
                f"denoiser must offer .raw(x, sigma) and .sigma_data, as EDMPrecond does; {type(denoiser).__name__} has no .{attribute}"
            )
    check_positive(denoiser.sigma_data, "denoiser.sigma_data")


def _check_data(data: Tensor) -> None:
    check_samples(data, "data")
    if data.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"data must be float32 or float64, since scores are differenced, got {data.dtype}")
    if data.ndim < 2 or len(data) == 0:
        raise ValueError(f"data must hold samples [N, ...] with N >= 1, got shape {list(data.shape)}")
