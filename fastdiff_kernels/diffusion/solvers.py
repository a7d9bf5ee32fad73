"""One step of each solver of the probability-flow equation dx/dsigma = (x - D(x, sigma)) / sigma.

Every step ends in `ops.guided_step`: the higher-order ones hand it the denoised sample whose Euler step is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .. import ops
from .guidance import guide
from .prediction import Predictor, neg_log

Step = Callable[[Predictor, Tensor, float, float], tuple[Tensor, Tensor]]


def euler_step(predict: Predictor, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
    """x + (sigma_next - sigma) (x - D) / sigma; returns (x_next, mean |x_next - x| per sample)."""
    denoised, uncond = predict(x, sigma)
    return ops.guided_step(x, denoised, sigma, sigma_next, uncond=uncond, guidance=predict.guidance)


def heun_step(predict: Predictor, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
    """The trapezoidal rule over an Euler step (Karras et al. 2022, Algorithm 1 without churn); to sigma_next = 0 an Euler step alone."""
    denoised, uncond = predict(x, sigma)
    guidance = predict.guidance
    euler, change = ops.guided_step(x, denoised, sigma, sigma_next, uncond=uncond, guidance=guidance)
    if sigma_next == 0:
        return euler, change
    slope_next = (euler - guide(*predict(euler, sigma_next), guidance)) / sigma_next
    average = 0.5 * (x + guide(denoised, uncond, guidance)) - (0.5 * sigma) * slope_next
    return ops.guided_step(x, average, sigma, sigma_next)


class DPMSolverPP2M:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Algorithm 2) in sigma, with lambda = -ln sigma and h = lambda_next - lambda.

    D' = D + h / (2 h_last) (D - D_last) and x_next = (sigma_next / sigma) x + (1 - sigma_next / sigma) D'; the first step and one to
    sigma_next = 0, where h is infinite, take D' = D.
    """

    def __init__(self) -> None:
        self.denoised: Tensor | None = None
        self.h = math.inf

    def __call__(self, predict: Predictor, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
        denoised = guide(*predict(x, sigma), predict.guidance)
        last, self.denoised = self.denoised, denoised
        if last is None or sigma_next == 0:
            used = denoised
        else:
            used = denoised + (neg_log(sigma_next) - neg_log(sigma)) / (2 * self.h) * (denoised - last)
        self.h = math.inf if sigma_next == 0 else neg_log(sigma_next) - neg_log(sigma)
        return ops.guided_step(x, used, sigma, sigma_next)


def _identity(sigma: float) -> float:
    return sigma


# Solver -> (a new step, the variable in which it treats its predictions as smooth).
SOLVERS: dict[str, tuple[Callable[[], Step], Callable[[float], float]]] = {
    "euler": (lambda: euler_step, _identity),
    "ddim": (lambda: euler_step, _identity),
    "heun": (lambda: heun_step, _identity),
    "dpmpp_2m": (DPMSolverPP2M, neg_log),
}
