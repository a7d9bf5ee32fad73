"""What a sampler carries from step to step: decisions about the network, the noise predictions they reuse, and the solver's update."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..reference.skipping import REUSE, STATE_WIDTH
from ._transfer import to_device
from .prediction import Predictor
from .skipping import AdaptiveSkip, FixedSkip

Predictions = tuple[Tensor, Tensor | None]


class Trajectory:
    """Steps from x at sigma to x_next at sigma_next, with the network's predictions or with what is remembered of them.

    Solvers call `predict`, which is None where no sample needs the network, then `step`. The memory is the last noise prediction of every
    sample, and with reuse="extrapolate" the one before it: it does not grow with the steps.
    """

    def __init__(self, predictor: Predictor, guidance: float, skip: AdaptiveSkip | FixedSkip | None, x: Tensor) -> None:
        self.predictor = predictor
        self.guidance = guidance
        self.decisions = _decisions(skip, x)
        self.reuse = torch.zeros(1, dtype=torch.bool)  # [1] or [B]: which samples this step does without the network
        self.rows: Tensor | None = None  # [B] where only some compute
        self.newest: Tensor | None = None
        self.older: Tensor | None = None
        self.extrapolates = skip is not None and skip.reuse == "extrapolate"

    def begin(self) -> Tensor:
        """Reads the decision about the step that begins: bool [1] or [B] on the CPU. On a GPU this is where the host waits for it."""
        self.reuse = self.decisions.read()
        return self.reuse

    def predict(self, x: Tensor, sigma: float) -> Predictions | None:
        """(denoised, unconditionally denoised or None) of the samples that this step computes, or None where it computes none."""
        if len(self.reuse) and bool(self.reuse.all()):
            return None
        if not bool(self.reuse.any()):
            self.rows = None
            return self.predictor(x, sigma)
        computed = (~self.reuse).nonzero()[:, 0]
        rows = torch.full(self.reuse.shape, -1, dtype=torch.int64)
        rows[computed] = torch.arange(len(computed))
        self.rows = to_device(rows, x.device)
        return self.predictor(x, sigma, computed)

    def step(
        self,
        x: Tensor,
        sigma: float,
        sigma_next: float,
        predictions: Predictions | None,
        *,
        at: float,
        reuse_at: float | None = None,
        complete: bool = True,
        **form: Any,
    ) -> ops.SolverStep:
        """`ops.solver_step`; `complete` is False for a stage that further predictions follow. `form`: its arguments that a solver sets."""
        decides = self.decisions.arguments(x, sigma, sigma_next) if complete else {"state": self.decisions.state}
        denoised, uncond = (None, None) if predictions is None else predictions
        rows = None if predictions is None else self.rows
        remembered: dict[str, Any] = {}
        if predictions is None or rows is not None:
            remembered = {"newest": self.newest, "older": self.older}
        result = ops.solver_step(
            x,
            sigma,
            sigma_next,
            denoised=denoised,
            uncond=uncond,
            guidance=1.0 if uncond is None else self.guidance,
            rows=rows,
            at=at,
            reuse_at=reuse_at,
            keep_noise=predictions is not None and self.decisions.state is not None,
            **remembered,
            **decides,
            **form,
        )
        if self.decisions.state is not None:
            if predictions is not None:
                self._remember(result.noise)
            self.decisions.advance(x, result, sigma, sigma_next, complete)
        return result

    def _remember(self, noise: Tensor) -> None:
        if self.extrapolates:
            if self.rows is None or self.older is None or self.newest is None:
                self.older = self.newest
            else:
                computed = (self.rows >= 0).view(-1, *[1] * (noise.ndim - 1))
                self.older = torch.where(computed, self.newest, self.older)
        self.newest = noise


def _decisions(skip: AdaptiveSkip | FixedSkip | None, x: Tensor) -> _Decisions:
    if skip is None:
        return _Decisions()
    return _OfDevice(skip, x) if isinstance(skip, AdaptiveSkip) else _OfHost(skip, x)


class _Decisions:
    """Every step computes, and nothing is remembered."""

    state: Tensor | None = None

    def read(self) -> Tensor:
        return torch.zeros(1, dtype=torch.bool)

    def arguments(self, x: Tensor, sigma: float, sigma_next: float) -> dict[str, Any]:
        return {"state": self.state}

    def advance(self, x: Tensor, result: ops.SolverStep, sigma: float, sigma_next: float, complete: bool) -> None:
        self.state = result.state


class _OfHost(_Decisions):
    """FixedSkip: known beforehand; the device's state tells only where the predictions in memory were made."""

    def __init__(self, rule: FixedSkip, x: Tensor) -> None:
        self.rule = rule
        self.steps = 0
        self.state = x.new_zeros((1, STATE_WIDTH), dtype=torch.float64)

    def read(self) -> Tensor:
        return torch.tensor([not self.rule.computes(self.steps)])

    def advance(self, x: Tensor, result: ops.SolverStep, sigma: float, sigma_next: float, complete: bool) -> None:
        super().advance(x, result, sigma, sigma_next, complete)
        self.steps += complete


class _OfDevice(_Decisions):
    """AdaptiveSkip: decided where the latents are, and read through pinned memory."""

    def __init__(self, rule: AdaptiveSkip, x: Tensor) -> None:
        self.rule = rule
        self.decisions = x.shape[0] if rule.per_sample else 1
        self.state = x.new_zeros((self.decisions, STATE_WIDTH), dtype=torch.float64)
        self.mailbox = _Mailbox(self.state)
        self.before: deque[tuple[Tensor, float]] = deque(maxlen=2)  # latents and levels, the newest first
        self.steps = 0

    def read(self) -> Tensor:
        # Nothing is decided yet, so there is nothing to wait for.
        if self.steps < self.rule.first_decision:
            return torch.zeros(self.decisions, dtype=torch.bool)
        return self.mailbox.read()[:, REUSE] != 0

    def arguments(self, x: Tensor, sigma: float, sigma_next: float) -> dict[str, Any]:
        rule = self.rule
        threshold, levels = rule.threshold, [sigma_next, sigma, *(level for _, level in self.before)]
        scales = [1 / math.sqrt(1 + level**2) if rule.space == "vp" else 1.0 for level in levels]
        if rule.space == "noise":
            scales, threshold = [1 / (sigma - sigma_next)] * 2, rule.threshold / (sigma - sigma_next)
        return {
            "state": self.state,
            "mode": rule.mode,
            "threshold": threshold,
            "max_skip": rule.max_skip,
            "before": (self.before[0][0], self.before[1][0]) if len(self.before) == 2 else None,
            "scales": [*scales, 1.0, 1.0][:4],
        }

    def advance(self, x: Tensor, result: ops.SolverStep, sigma: float, sigma_next: float, complete: bool) -> None:
        super().advance(x, result, sigma, sigma_next, complete)
        if not complete:
            return
        self.steps += 1
        self.mailbox.post(result.state)
        if self.rule.mode == "tensor":
            self.before.appendleft((x, sigma))


class _Mailbox:
    """Carries the state to the host: copied into pinned memory behind the kernels, awaited by that copy's event alone."""

    def __init__(self, state: Tensor) -> None:
        self.letter = torch.empty(state.shape, dtype=state.dtype, pin_memory=True) if state.is_cuda else state
        self.arrived = torch.cuda.Event() if state.is_cuda else None

    def post(self, state: Tensor) -> None:
        if self.arrived is None:
            self.letter = state
            return
        self.letter.copy_(state, non_blocking=True)
        self.arrived.record(torch.cuda.current_stream(state.device))

    def read(self) -> Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.letter
