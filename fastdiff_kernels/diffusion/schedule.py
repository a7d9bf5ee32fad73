"""The noise levels a sampler visits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .._checks import check_count, check_positive
from ._hosts import set_diffusers_schedule
from .noise_levels import check_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Schedule:
    """Strictly decreasing noise levels sigma_0 > sigma_1 > ... >= 0, from the noisiest to the last; num_steps = levels - 1.

    Args:
        sigmas: at least two finite levels (a sequence, an array or a 1-D tensor). Only the last may be 0; it stands there when wanted.
        knots, cost: where the schedule was optimised, the grid [K + 1] it was estimated on and the incremental costs [K].
        cost_error, error: beside those, standard errors: of the costs [K], and of the levels, in ln sigma [num_steps + 1].

    Attributes:
        sigmas: the levels, float64 on the CPU, [num_steps + 1].
        knots, cost, cost_error, error: as given, float64 on the CPU, or None.

    Raises:
        TypeError: sigmas is not numeric. ValueError: it is not 1-D, too short, not finite, negative or not strictly decreasing.
    """

    def __init__(
        self,
        sigmas: Sequence[float] | np.ndarray | Tensor,
        *,
        knots: Sequence[float] | np.ndarray | Tensor | None = None,
        cost: Sequence[float] | np.ndarray | Tensor | None = None,
        cost_error: Sequence[float] | np.ndarray | Tensor | None = None,
        error: Sequence[float] | np.ndarray | Tensor | None = None,
    ) -> None:
        self.sigmas = _levels(sigmas, "sigmas")
        if (knots is None) != (cost is None):
            raise ValueError(f"knots and cost come together, got only {'knots' if cost is None else 'cost'}")
        self.knots: Tensor | None = None
        self.cost: Tensor | None = None
        if knots is not None:
            self.knots, self.cost = _costs(knots, cost)
        self.cost_error = _errors(cost_error, self.cost, "cost_error", "cost")
        self.error = _errors(error, None if cost is None else self.sigmas, "error", "sigmas of an optimised schedule")

    @classmethod
    def karras(cls, num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Schedule:
        """num_steps levels (sigma_max^(1/rho) + i/(num_steps-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho and a final 0.

        One step alone goes from sigma_max to 0 (Karras et al. 2022, eq. 5).
        """
        check_count(num_steps, "num_steps")
        check_range(sigma_min, sigma_max)
        check_positive(rho, "rho")
        ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=torch.float64) ** rho
        return cls(_with_ends(ramp, sigma_min, sigma_max))

    @classmethod
    def log_uniform(cls, num_steps: int, sigma_min: float, sigma_max: float) -> Schedule:
        """num_steps levels in geometric progression from sigma_max to sigma_min, and a final 0."""
        check_count(num_steps, "num_steps")
        check_range(sigma_min, sigma_max)
        return cls(_with_ends(log_grid(num_steps, sigma_min, sigma_max), sigma_min, sigma_max))

    @classmethod
    def scaled_linear(cls, num_steps: int, *, beta_start: float = 0.00085, beta_end: float = 0.012, train_steps: int = 1000) -> Schedule:
        """The levels Stable Diffusion samples at: num_steps times spread evenly over the training times, and a final 0.

        sqrt(beta) runs linearly over train_steps times and sigma^2 = (1 - abar) / abar with abar = prod(1 - beta)
        (Rombach et al. 2022; "linspace" spacing). The levels are in the VE parametrisation, x = x0 + sigma eps.
        """
        check_count(num_steps, "num_steps")
        check_count(train_steps, "train_steps", 2)
        check_positive(beta_start, "beta_start")
        if not beta_start < check_positive(beta_end, "beta_end") < 1:
            raise ValueError(f"beta_start < beta_end < 1 must hold, got {beta_start} and {beta_end}")
        beta = np.linspace(beta_start**0.5, beta_end**0.5, train_steps) ** 2
        abar = np.cumprod(1 - beta)
        times = np.linspace(train_steps - 1, 0, num_steps)
        return cls(np.append(np.interp(times, np.arange(train_steps), np.sqrt((1 - abar) / abar)), 0.0))

    @property
    def num_steps(self) -> int:
        """How many steps a sampler takes along the schedule: one fewer than there are levels."""
        return len(self.sigmas) - 1

    @property
    def length(self) -> float | None:
        """Lambda = sum of sqrt(cost): the length of the path in the metric the schedule was optimised for; None where it was not."""
        return None if self.cost is None else float(self.cost.sqrt().sum())

    def to_k_diffusion(self, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The levels as k-diffusion's and ComfyUI's `sample_*(model, x, sigmas)` take them, [num_steps + 1], the final 0 included.

        Raises:
            ValueError: two levels are equal once rounded to `dtype`.
        """
        sigmas = self.sigmas.to(dtype)
        if not bool((sigmas.diff() < 0).all()):
            raise ValueError(f"sigmas are no longer strictly decreasing once rounded to {dtype}")
        return sigmas.to(device)

    def to_edm(self, *, device: torch.device | str | None = None) -> Tensor:
        """The levels as EDM's and EDM2's samplers hold them in `t_steps`: float64 [num_steps + 1], the final 0 included."""
        return self.sigmas.to(device=device, copy=True)

    def to_fastgen(self) -> list[float]:
        """The levels as FastGen's sampling config takes them in `t_list`, the final 0 included."""
        return self.sigmas.tolist()

    def to_flow_matching(self) -> Schedule:
        """The same levels as the times t = sigma / (1 + sigma) of a rectified flow x_t = (1 - t) x0 + t eps; x_t = x / (1 + sigma)."""
        return Schedule(self.sigmas / (1 + self.sigmas))

    def to_diffusers(self, scheduler: object) -> dict[str, object]:
        """Set `scheduler` to these levels exactly, and return the keyword arguments of `set_timesteps` (or of a pipeline) that do so.

        * `EDMEulerScheduler` reads `sigmas=` as a ramp within its Karras range: it gets the inverse of that map, as a tensor.
        * `EulerDiscreteScheduler` takes the levels with the final 0, without which it would stop a step early.
        * `FlowMatchEulerDiscreteScheduler` takes times in (0, 1], shifts them and appends the 0: it gets them with the shift undone.
          See `to_flow_matching`.
        * `DPMSolverMultistepScheduler` and `UniPCMultistepScheduler` take integer timesteps at most: `set_timesteps` of this one object is
          replaced, and sets these levels and the times between integers that belong to them. `del scheduler.set_timesteps` undoes it.

        The first level is the schedule's own; where it is not the scheduler's, scale the initial noise accordingly.

        Raises:
            TypeError: the scheduler is none of these. ValueError: its configuration cannot represent these levels.
            RuntimeError: it was set and holds other levels afterwards.
        """
        return set_diffusers_schedule(scheduler, self.sigmas)

    def plot(self) -> Figure:
        """The levels over the steps, and where the schedule was optimised its speed d(length) / d(ln sigma) with the levels on it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Schedule.plot needs matplotlib: pip install 'fastdiff-kernels[train]'") from error
        figure = Figure(figsize=(5 if self.cost is None else 10, 4), layout="constrained")
        axes = figure.subplots(1, 1 if self.cost is None else 2, squeeze=False)[0]
        levels = self.sigmas[self.sigmas > 0].numpy()
        axes[0].semilogy(levels, marker="o", markersize=3)
        axes[0].set(xlabel="step", ylabel="sigma", title=f"{self.num_steps} steps")
        if self.knots is not None and self.cost is not None:
            logs = self.knots[self.knots > 0].log()
            speed = self.cost[: len(logs) - 1].sqrt() / -logs.diff()
            middle = ((logs[1:] + logs[:-1]) / 2).exp()
            axes[1].semilogx(middle.numpy(), speed.numpy())
            axes[1].plot(levels, np.zeros_like(levels), marker="|", markersize=12, linestyle="none", color="black")
            axes[1].set(xlabel="sigma", ylabel="d length / d ln sigma", title=f"length {self.length:.3f}")
        return figure

    def __repr__(self) -> str:
        return f"Schedule({self.num_steps} steps, {self.sigmas[0]:.6g} to {self.sigmas[-1]:.6g})"


def log_grid(count: int, sigma_min: float, sigma_max: float) -> Tensor:
    """`count` levels in geometric progression from sigma_max down to sigma_min, float64 [count]."""
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), count, dtype=torch.float64).exp()


def _with_ends(levels: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    # Powers and exponentials return the ends only up to rounding.
    if len(levels) > 1:
        levels[-1] = sigma_min
    levels[0] = sigma_max
    return torch.cat((levels, levels.new_zeros(1)))


def _vector(values: object, name: str) -> Tensor:
    try:
        vector = torch.as_tensor(values, dtype=torch.float64).detach().to(device="cpu", copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a sequence of numbers, an array or a tensor, got {type(values).__name__}") from error
    if vector.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {list(vector.shape)}")
    return vector


def _levels(values: object, name: str) -> Tensor:
    levels = _vector(values, name)
    if len(levels) < 2:
        raise ValueError(f"{name} must hold at least two levels, got {len(levels)}")
    if not bool(torch.isfinite(levels).all()):
        raise ValueError(f"{name} must be finite, got {levels.tolist()}")
    if levels[-1] < 0:
        raise ValueError(f"{name} must not be negative, got {levels[-1].item()} at the end")
    rises = (levels.diff() >= 0).nonzero()
    if len(rises):
        at = int(rises[0])
        raise ValueError(f"{name} must be strictly decreasing, got {levels[at].item()} then {levels[at + 1].item()} at position {at}")
    return levels


def _costs(knots: object, cost: object) -> tuple[Tensor, Tensor]:
    grid, costs = _levels(knots, "knots"), _vector(cost, "cost")
    if len(costs) != len(grid) - 1:
        raise ValueError(f"cost must have one entry for each of the {len(grid) - 1} intervals of knots, got {len(costs)}")
    if not bool(torch.isfinite(costs).all() and (costs >= 0).all()):
        raise ValueError("cost must be finite and not negative")
    return grid, costs


def _errors(errors: object, like: Tensor | None, name: str, like_name: str) -> Tensor | None:
    if errors is None:
        return None
    if like is None:
        raise ValueError(f"{name} comes beside knots and cost, which are None")
    vector = _vector(errors, name)
    if len(vector) != len(like) or not bool((vector >= 0).all()):
        raise ValueError(f"{name} must hold {len(like)} numbers of at least 0, as many as {like_name}; got {vector.tolist()}")
    return vector
