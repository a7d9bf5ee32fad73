"""The denoiser's predictions along one trajectory: one network call for all samples that need one, doubled under guidance, and counted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._transfer import to_device
from .guidance import stack_conditioning, take_rows


class Predictor:
    """Calls the denoiser once for a batch, doubled under guidance, and counts the calls.

    Attributes:
        nfe: network calls. evaluations: how often each sample was in one, int64 [B] on the CPU.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        batch: int,
        conditioning: dict[str, object],
        unconditional: dict[str, object] | None,
    ) -> None:
        self.denoiser = denoiser
        self.batch = batch
        self.copies = 1 if unconditional is None else 2
        self.conditioning = conditioning if unconditional is None else stack_conditioning(conditioning, unconditional)
        self.nfe = 0
        self.evaluations = torch.zeros(batch, dtype=torch.int64)

    def __call__(self, x: Tensor, sigma: float, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(denoised, unconditionally denoised or None) for x [B, ...] at sigma, or for its `rows` (int64 on the CPU) alone."""
        conditioning = self.conditioning
        if rows is None:
            self.evaluations += 1
        else:
            self.evaluations[rows] += 1
            rows = to_device(rows, x.device)
            copies = torch.cat([rows + copy * self.batch for copy in range(self.copies)])
            x, conditioning = x[rows], take_rows(conditioning, copies)
        denoised = self._call(x if self.copies == 1 else torch.cat((x, x)), sigma, conditioning)
        if self.copies == 1:
            return denoised, None
        conditional, unconditional = denoised.tensor_split(2)
        return conditional, unconditional

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
