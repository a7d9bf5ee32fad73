"""Denoised predictions along one trajectory: computed by the network, or reused from its last noise predictions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import per_sample
from .guidance import stack_conditioning, take_rows


class NoiseMemory:
    """The last noise prediction of every row, and the one before it where prediction is to be continued linearly.

    `at` is the solver's own variable. Rows are written separately since each sample may have been computed at another step.
    """

    def __init__(self, extrapolate: bool) -> None:
        self.kept = 2 if extrapolate else 1
        self.entries: list[tuple[Tensor, Tensor]] = []  # newest first: (noise [R, ...], at [R] float64)

    def store(self, noise: Tensor, at: float, rows: Tensor | None) -> None:
        """Keep `noise` for `rows` (int64), or for all rows where that is None."""
        if rows is None:
            everywhere = torch.full((noise.shape[0],), at, dtype=torch.float64, device=noise.device)
            self.entries = [(noise, everywhere), *self.entries][: self.kept]
            return
        newest, newest_at = self.entries[0]
        for older, older_at in self.entries[1:]:
            older[rows], older_at[rows] = newest[rows], newest_at[rows]
        newest[rows], newest_at[rows] = noise, at

    def predict(self, at: float) -> Tensor:
        """The noise prediction at `at`: held, or on the line through the last two. [R, ...]"""
        newest, newest_at = self.entries[0]
        if len(self.entries) == 1:
            return newest
        older, older_at = self.entries[1]
        ahead = (at - newest_at) / (newest_at - older_at)  # [R]
        return newest + per_sample(ahead, newest).to(newest.dtype) * (newest - older)


class Predictor:
    """Calls the denoiser once for a batch, doubled under guidance, and counts the calls.

    Attributes:
        reuse: bool [1] or [B] on the CPU; the samples whose prediction comes from memory until it is set anew.
        nfe: network calls. evaluations: how often each sample was in one, int64 [B] on the CPU.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        batch: int,
        conditioning: dict[str, object],
        unconditional: dict[str, object] | None,
        guidance: float,
        memory: NoiseMemory | None,
        variable: Callable[[float], float],
    ) -> None:
        self.denoiser = denoiser
        self.guidance = guidance
        self.copies = 1 if unconditional is None else 2
        self.conditioning = conditioning if unconditional is None else stack_conditioning(conditioning, unconditional)
        self.memory = memory
        self.variable = variable
        self.reuse = torch.zeros(1, dtype=torch.bool)
        self.nfe = 0
        self.evaluations = torch.zeros(batch, dtype=torch.int64)

    def __call__(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor | None]:
        """(denoised, unconditionally denoised or None) for x at sigma, each [B, ...]."""
        stacked = x if self.copies == 1 else torch.cat((x, x))  # [copies B, ...]
        denoised = self._compute(stacked, sigma) if self.memory is None else self._compute_or_reuse(self.memory, stacked, sigma)
        if self.copies == 1:
            return denoised, None
        conditional, unconditional = denoised.tensor_split(2)
        return conditional, unconditional

    def _compute_or_reuse(self, memory: NoiseMemory, stacked: Tensor, sigma: float) -> Tensor:
        at = self.variable(sigma)
        if not self.reuse.any():
            denoised = self._compute(stacked, sigma)
            memory.store((stacked - denoised) / sigma, at, None)
            return denoised
        reused = stacked - sigma * memory.predict(at)
        if self.reuse.all():
            return reused
        rows = (~self.reuse).nonzero()[:, 0]
        self.evaluations[rows] += 1
        batch = self.reuse.shape[0]
        rows = torch.cat([rows + copy * batch for copy in range(self.copies)]).to(stacked.device)
        gathered = stacked[rows]
        denoised = self._call(gathered, sigma, take_rows(self.conditioning, rows))
        memory.store((gathered - denoised) / sigma, at, rows)
        reused[rows] = denoised
        return reused

    def _compute(self, stacked: Tensor, sigma: float) -> Tensor:
        self.evaluations += 1
        return self._call(stacked, sigma, self.conditioning)

    def _call(self, x: Tensor, sigma: float, conditioning: dict[str, object]) -> Tensor:
        self.nfe += 1
        dtype = torch.promote_types(x.dtype, torch.float32)
        denoised = self.denoiser(x, torch.full((x.shape[0],), sigma, dtype=dtype, device=x.device), **conditioning)
        if not isinstance(denoised, Tensor):
            raise TypeError(f"denoiser must return a tensor, got {type(denoised).__name__}")
        if denoised.shape != x.shape:
            raise ValueError(f"denoiser must return a tensor of x's shape {list(x.shape)}, got {list(denoised.shape)}")
        if denoised.dtype != x.dtype:
            raise TypeError(
                f"denoiser must return x's dtype {x.dtype}, got {denoised.dtype}; a float32 noise keeps the trajectory in float32"
            )
        return denoised


def neg_log(sigma: float) -> float:
    """-ln sigma, in which DPM-Solver's steps are exact for a constant prediction."""
    return -math.log(sigma)
