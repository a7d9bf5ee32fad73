"""A schedule that follows a score network while that is trained (arXiv 2412.07877, the online algorithm)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._checks import check_choice, check_count, check_number
from .costs import RawDenoiser, check_denoiser, corrector_costs
from .guidance import check_conditioning
from .interval_costs import IntervalCosts, check_data
from .noise_levels import check_range
from .schedule import Schedule, log_grid


class OnlineSchedule:
    """Levels for training and sampling that are moved, now and then, towards those of the network's current costs.

    Call `observe` once a training step. It does nothing for `burn_in` steps: an untrained score collapses the levels to the noisy end.
    From then on each call estimates the corrector cost of one interval of a fixed, fine grid (one network call without gradients), the
    intervals taking turns. When each has had `min_visits` turns the levels move, in ln sigma, by `damping` of the way to those of equal
    sums of sqrt(cost), and the estimate starts afresh.

    It is a noise law, called as schedule(count, generator): `ScoreTrainer(denoiser, noise_law=OnlineSchedule(...))` draws its levels from
    it, has it observe the averaged denoiser once a step, and keeps it in its checkpoints.

    Args:
        num_steps: levels without the final 0, in geometric progression at first.
        sigma_min, sigma_max: the ends, which stay.
        knots: levels of the grid, at least 3.
        burn_in: steps before the first estimate. min_visits: batches an interval has before the levels move.
        damping: in (0, 1]; the paper's gamma.
        interpolation: "pchip" or "linear". seed: of the noise.

    Raises:
        TypeError, ValueError: an argument outside of what is listed.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        sigma_min: float,
        sigma_max: float,
        knots: int = 128,
        burn_in: int = 1000,
        min_visits: int = 4,
        damping: float = 0.1,
        interpolation: str = "pchip",
        seed: int = 0,
    ) -> None:
        check_count(num_steps, "num_steps", 2)
        check_range(sigma_min, sigma_max)
        check_count(knots, "knots", 3)
        self.burn_in, self.min_visits = check_count(burn_in, "burn_in", 0), check_count(min_visits, "min_visits")
        self.damping = check_number(damping, "damping", above=0, maximum=1)
        self.interpolation = check_choice(interpolation, "interpolation", ("pchip", "linear"))
        self.seed = check_count(seed, "seed", 0)
        self.levels, self.grid = log_grid(num_steps, sigma_min, sigma_max), log_grid(knots, sigma_min, sigma_max)
        for ends in (self.levels, self.grid):
            ends[0], ends[-1] = sigma_max, sigma_min
        self.steps = self.moves = self.seen = 0
        self.estimate = IntervalCosts(self.grid, {})

    @property
    def schedule(self) -> Schedule:
        """The current levels and a final 0."""
        return Schedule(torch.cat((self.levels, self.levels.new_zeros(1))))

    def draw(self, count: int, *, device: torch.device | str | None = None, generator: torch.Generator | None = None) -> Tensor:
        """`count` levels to train at, float32 [count]: in an interval of the schedule chosen evenly, ln sigma uniform inside it."""
        check_count(count, "count", 0)
        place = torch.rand(count, device=device, generator=generator) * (len(self.levels) - 1)
        interval = place.long().clamp(max=len(self.levels) - 2)
        logs = self.levels.log().float().to(place.device)
        return torch.lerp(logs[interval], logs[interval + 1], place - interval).exp()

    def __call__(self, count: int, generator: torch.Generator) -> Tensor:
        """`draw` on the generator's device."""
        return self.draw(count, device=generator.device, generator=generator)

    def observe(self, denoiser: RawDenoiser, clean: Tensor, conditioning: Mapping[str, object] | None = None) -> bool:
        """Notes a training step and, after the burn-in, one interval's cost on a batch [B, ...]; says whether the levels have moved.

        Raises:
            TypeError, ValueError: as `optimize_schedule`; where a cost is not finite, when its round is complete.
        """
        self.steps += 1
        if self.steps <= self.burn_in:
            return False
        check_denoiser(denoiser)
        check_data(clean)
        given = check_conditioning(conditioning, len(clean), "conditioning")
        high, low = self.grid[self.estimate.turn].item(), self.grid[self.estimate.turn + 1].item()
        self.estimate.add(corrector_costs(denoiser, clean, given, low, high, self.seed, self.seen))
        self.seen += len(clean)
        if self.estimate.turn < self.estimate.intervals:
            return False
        self.estimate.finish_round()
        if self.estimate.rounds < self.min_visits:
            return False
        self._move()
        return True

    def _move(self) -> None:
        target = ops.integrate_schedule(self.grid, self.estimate.means, len(self.levels) - 1, interpolation=self.interpolation)
        inner = torch.lerp(self.levels.log(), target.log(), self.damping)[1:-1].exp()
        self.levels = torch.cat((self.levels[:1], inner, self.levels[-1:]))
        self.moves += 1
        self.estimate = IntervalCosts(self.grid, {})

    _STATE = ("levels", "grid", "steps", "moves", "seen")
    _SETTINGS = ("burn_in", "min_visits", "damping", "interpolation", "seed")

    def state_dict(self) -> dict[str, Any]:
        """Levels, counts and the estimate as far as it is: a schedule that takes it up goes on with the same bits.

        Raises:
            ValueError: a cost of the estimate is not finite.
        """
        return {**{name: getattr(self, name) for name in (*self._STATE, *self._SETTINGS)}, "estimate": self.estimate.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a `state_dict`.

        Raises:
            ValueError: it is of a schedule that was made with other arguments.
        """
        if missing := [name for name in (*self._STATE, *self._SETTINGS, "estimate") if name not in state]:
            raise ValueError(f"state: must hold {', '.join(missing)} too, as this version saves it; got {', '.join(state)}")
        for name in ("levels", "grid"):
            own, other = getattr(self, name), state[name]
            if own.shape != other.shape or own[0] != other[0] or own[-1] != other[-1]:
                raise ValueError(f"state: {name} must be {len(own)} from {own[0]:g} to {own[-1]:g}; got {len(other)} from {other[0]:g}")
        for name in self._SETTINGS:
            if state[name] != getattr(self, name):
                raise ValueError(f"state: {name} must be {getattr(self, name)!r}; got {state[name]!r}")
        for name in self._STATE:
            value = state[name]
            # A checkpoint may have been read onto a GPU.
            setattr(self, name, value.cpu() if isinstance(value, Tensor) else value)
        self.estimate = IntervalCosts(self.grid, {})
        self.estimate.load_state_dict(state["estimate"])
