"""Running estimates of the costs of a grid's intervals: from streams of batches, with standard errors, to a file and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _fingerprints
from ._checks import check_samples
from ._transfer import to_device
from .costs import RawDenoiser
from .guidance import check_conditioning, leaves, take_rows

Costs = Callable[[RawDenoiser, Tensor, dict[str, object], float, float, int, int], Tensor]

FIRST_BATCH = "first batch and its conditioning"


class Batches:
    """Fresh data and noise for every interval: errors average out along the running sum, where common ones would add up."""

    def __init__(
        self,
        data: Tensor | Iterable[Tensor | Sequence[Any]],
        conditioning: dict[str, object],
        batch_size: int,
        seed: int,
    ) -> None:
        if not isinstance(data, Tensor) and not isinstance(data, Iterable):
            raise TypeError(f"data must be a tensor or an iterable of batches, got {type(data).__name__}")
        if isinstance(data, Tensor):
            check_data(data)
            self.order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        elif isinstance(data, (list, tuple)) and not all(isinstance(item, (Tensor, tuple, list)) for item in data):
            raise TypeError("data must be a tensor or an iterable of batches, got a sequence of other things")
        elif any(isinstance(value, Tensor) for _, value in leaves(conditioning, "conditioning")):
            raise ValueError("conditioning must hold scalars where data is an iterable; its batches bring their own tensors")
        self.data, self.conditioning, self.batch_size, self.seed = data, conditioning, batch_size, seed
        self.stream: Iterator | None = None
        self.ahead: tuple[Tensor, dict[str, object]] | None = None  # the stream's first batch, where it was looked at before its turn
        self.taken = 0  # batches from the stream

    def opening(self) -> str:
        """Tells the first batch, and what conditions it, from others."""
        if isinstance(self.data, Tensor):
            return _fingerprints.of_batch(*self._drawn(self.data, 0))
        self.ahead = self._pull()
        clean, given = self.ahead
        return _fingerprints.of_batch(clean, {**self.conditioning, **given})

    def evaluate(self, costs: Costs, denoiser: RawDenoiser, estimate: IntervalCosts) -> Tensor:
        """Costs of the interval whose turn it is, for the next batch, [B]. Which noise and data depends on what `estimate` has seen."""
        first = estimate.samples
        clean, given = self._drawn(self.data, first) if isinstance(self.data, Tensor) else self._streamed(estimate)
        high, low = estimate.grid[estimate.turn].item(), estimate.grid[estimate.turn + 1].item()
        return costs(denoiser, clean, given, low, high, self.seed, first)

    def _drawn(self, data: Tensor, first: int) -> tuple[Tensor, dict[str, object]]:
        rows = to_device(self.order[torch.arange(first, first + self.batch_size) % len(data)], data.device)
        return data[rows], take_rows(self.conditioning, rows)

    def _streamed(self, estimate: IntervalCosts) -> tuple[Tensor, dict[str, object]]:
        self._skip_to(estimate)
        clean, given = self._next()
        if estimate.path is not None:
            estimate.fingerprint = _fingerprints.of_tensor(clean[0], estimate.fingerprint)
        return clean, {**self.conditioning, **given}

    def _skip_to(self, estimate: IntervalCosts) -> None:
        """Passes over what an estimate from a file has counted already; ValueError where the stream does not give that again."""
        if self.taken == estimate.batches:
            return
        samples = fingerprint = 0
        while self.taken < estimate.batches:
            clean, _ = self._next()
            samples, fingerprint = samples + len(clean), _fingerprints.of_tensor(clean[0], fingerprint)
        if (samples, fingerprint) != (estimate.samples, estimate.fingerprint):
            raise ValueError(
                f"data must give the {estimate.batches} batches again that '{estimate.path}' has counted, and in their order; it gave "
                f"others, of {samples} samples, expected {estimate.samples}. A stream that shuffles needs a seed"
            )

    def _next(self) -> tuple[Tensor, dict[str, object]]:
        batch, self.ahead = self._pull() if self.ahead is None else self.ahead, None
        self.taken += 1
        return batch

    def _pull(self) -> tuple[Tensor, dict[str, object]]:
        if self.stream is None:
            self.stream = iter(self.data)
        item = next(self.stream, None)
        if item is None:
            self.stream = iter(self.data)
            item = next(self.stream, None)
        if item is None:
            raise ValueError("data gives no batch when started again; it must be an iterable that can be, such as a list or a DataLoader")
        # Collated by a DataLoader a pair is a list, and a lone tensor of a TensorDataset a list of one.
        parts = item if isinstance(item, (tuple, list)) else (item,)
        if not 1 <= len(parts) <= 2:
            raise TypeError(f"data must give batches or pairs (batch, conditioning), got a {type(item).__name__} of {len(parts)}")
        clean = parts[0]
        check_data(clean)
        return clean, check_conditioning(parts[1] if len(parts) == 2 else None, len(clean), "the batch's conditioning")


class IntervalCosts:
    """Counts, means and squared deviations of the costs of every interval between the levels of `grid`, falling, float64 [K + 1].

    The intervals take turns, from the noisiest to the cleanest, once a round.

    Attributes:
        rounds: how often every interval was given a batch. turn: the interval that the next batch is for, K where the round ends.
        samples: how many rows all intervals were given together. fingerprint: of each batch's first datum, where they are a stream.
        last_grid, last_cost, last_error: of the grid before the last `move`.

    With a path the estimate is read from it, where it exists and has the same settings, and `save` writes it there.
    """

    def __init__(self, grid: Tensor, settings: dict[str, object], path: str | os.PathLike | None = None) -> None:
        self.grid, self.path = grid, None if path is None else Path(path)
        self.settings = {**settings, "levels": len(grid), "from": float(grid[0]), "to": float(grid[-1])}
        self.rounds = self.turn = self.samples = self.fingerprint = 0
        self.parts: list[tuple[int, int, Tensor]] = []
        self._clear()
        # `add` changes the means in place.
        self.last_grid, self.last_cost, self.last_error = self.grid, self.means.clone(), self.means.clone()
        if self.path is not None and self.path.exists():
            self._load(self.path)

    @property
    def intervals(self) -> int:
        return len(self.grid) - 1

    @property
    def batches(self) -> int:
        """How many were added, in all rounds."""
        return self.rounds * self.intervals + self.turn

    def add(self, costs: Tensor) -> None:
        """Costs [B] of the interval whose turn it is; looked at by `finish_round` or `save`, so that a GPU is not waited for before."""
        self.parts.append((self.turn, len(costs), torch.stack((costs.double().mean(), costs.double().var(unbiased=False)))))
        self.turn += 1
        self.samples += len(costs)

    def finish_round(self) -> None:
        """Merges what was added; ValueError where a cost is not finite, or all are 0."""
        self._merge_parts()
        if not bool((self.means > 0).any()):
            raise ValueError(
                f"denoiser.raw gives no cost above 0 between sigma {self.grid[0]:g} and {self.grid[-1]:g}; its score must change with sigma"
            )
        self.rounds, self.turn = self.rounds + 1, 0

    def move(self, levels: Tensor) -> None:
        """Goes on with other levels, of whose intervals nothing is known yet."""
        self.last_grid, self.last_cost, self.last_error = self.grid, self.means, self.error()
        self.grid = levels
        self._clear()

    def error(self) -> Tensor:
        """Standard errors of the mean costs, [K]; infinite for a single sample."""
        return (self.squares / (self.counts - 1).clamp(min=0) / self.counts).sqrt().nan_to_num(nan=torch.inf)

    _TENSORS = ("grid", "counts", "means", "squares", "last_grid", "last_cost", "last_error")
    _NUMBERS = ("rounds", "turn", "samples", "fingerprint")

    def state_dict(self) -> dict[str, Any]:
        """All that was added so far; ValueError where a cost is not finite."""
        self._merge_parts()
        tensors = {name: getattr(self, name).clone() for name in self._TENSORS}
        return {**tensors, **{name: getattr(self, name) for name in self._NUMBERS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        for name in self._TENSORS:
            setattr(self, name, state[name].to("cpu", copy=True))
        for name in self._NUMBERS:
            setattr(self, name, state[name])
        self.parts = []

    def save(self) -> None:
        """Writes the file at once or not at all."""
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        torch.save({"settings": self.settings, "state": self.state_dict()}, partial)
        partial.replace(self.path)

    def _load(self, path: Path) -> None:
        held = torch.load(path, weights_only=True)
        if not isinstance(held, dict) or held.keys() != {"settings", "state"} or held["settings"].keys() != self.settings.keys():
            raise ValueError(f"path: '{path}' must hold an estimate that optimize_schedule of this version has saved, got something else")
        other = {name: value for name, value in held["settings"].items() if value != self.settings[name]}
        if other:
            got = {name: self.settings[name] for name in other}
            reordered = self.settings["data"] == "a stream" and FIRST_BATCH in other
            hint = ". A stream that shuffles needs a seed" if reordered else ""
            raise ValueError(f"path: '{path}' holds an estimate with {other}, got {got}{hint}")
        self.load_state_dict(held["state"])

    def _clear(self) -> None:
        self.counts, self.means, self.squares = torch.zeros(3, self.intervals, dtype=torch.float64)
        self.parts = []

    def _merge_parts(self) -> None:
        if not self.parts:
            return
        values = torch.stack([part for _, _, part in self.parts]).cpu()  # [parts, 2]
        for (interval, count, _), (mean, variance) in zip(self.parts, values.tolist(), strict=True):
            self._merge(interval, count, mean, variance)
        self.parts = []
        broken = (~torch.isfinite(self.means)).nonzero()
        if len(broken):
            at = int(broken[0])
            raise ValueError(f"denoiser.raw gives a cost of {self.means[at]:g} between sigma {self.grid[at]:g} and {self.grid[at + 1]:g}")

    def _merge(self, interval: int, count: int, mean: float, variance: float) -> None:
        held = float(self.counts[interval])
        step = mean - float(self.means[interval])
        total = held + count
        self.counts[interval] = total
        self.means[interval] += step * count / total
        self.squares[interval] += variance * count + step**2 * held * count / total


def check_data(data: Tensor) -> None:
    """Samples [N, ...], N >= 1, in a dtype that scores can be differenced in."""
    check_samples(data, "data")
    if data.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"data must be float32 or float64, since scores are differenced, got {data.dtype}")
    if data.ndim < 2 or len(data) == 0:
        raise ValueError(f"data must hold samples [N, ...] with N >= 1, got shape {list(data.shape)}")
