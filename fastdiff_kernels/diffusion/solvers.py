"""One step of each solver of the probability-flow equation dx/dsigma = (x - D(x, sigma)) / sigma.

Every step ends in one `ops.solver_step`, where guidance, the update and the criterion for skipping are one pass; see `Trajectory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from .trajectory import Trajectory

Step = Callable[[Trajectory, Tensor, float, float], Tensor]


def euler_step(trajectory: Trajectory, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x + (sigma_next - sigma) (x - D) / sigma."""
    return trajectory.step(x, sigma, sigma_next, trajectory.predict(x, sigma), at=sigma).x_next


def heun_step(trajectory: Trajectory, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The trapezoidal rule over an Euler step (Karras et al. 2022, Algorithm 1 without churn); to sigma_next = 0 an Euler step alone.

    Where both of a step's predictions are reused, the rule over a line is the line's middle.
    """
    first = trajectory.predict(x, sigma)
    if sigma_next == 0:
        return trajectory.step(x, sigma, sigma_next, first, at=sigma).x_next
    middle = (sigma + sigma_next) / 2
    if first is None:
        return trajectory.step(x, sigma, sigma_next, None, at=middle).x_next
    euler = trajectory.step(x, sigma, sigma_next, first, at=sigma, complete=False).x_next
    second = trajectory.predict(euler, sigma_next)
    return trajectory.step(x, sigma, sigma_next, second, at=sigma_next, reuse_at=middle, point=euler).x_next


class DPMSolverPP2M:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, Algorithm 2) in sigma, with lambda = -ln sigma and h = lambda_next - lambda.

    D' = D + h / (2 h_last) (D - D_last) and x_next = (sigma_next / sigma) x + (1 - sigma_next / sigma) D'; the first step and one to
    sigma_next = 0, where h is infinite, take D' = D.
    """

    def __init__(self) -> None:
        self.denoised: Tensor | None = None
        self.h = math.inf

    def __call__(self, trajectory: Trajectory, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        predictions = trajectory.predict(x, sigma)
        h = math.inf if sigma_next == 0 else neg_log(sigma_next) - neg_log(sigma)
        previous = None if sigma_next == 0 else self.denoised
        weight = 0.0 if previous is None else h / (2 * self.h)
        # Without guidance and reuse the denoiser's own output is D.
        given = predictions is not None and predictions[1] is None and predictions[0].shape == x.shape
        result = trajectory.step(
            x, sigma, sigma_next, predictions, at=neg_log(sigma), previous=previous, previous_weight=weight, keep_denoised=not given
        )
        self.denoised = predictions[0] if predictions is not None and given else result.denoised
        self.h = h
        return result.x_next


def neg_log(sigma: float) -> float:
    """-ln sigma, in which DPM-Solver's steps are exact for a constant prediction."""
    return -math.log(sigma)


SOLVERS: dict[str, Callable[[], Step]] = {
    "euler": lambda: euler_step,
    "ddim": lambda: euler_step,
    "heun": lambda: heun_step,
    "dpmpp_2m": DPMSolverPP2M,
}
