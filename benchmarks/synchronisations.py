"""Which calls of a trajectory wait for the GPU, by a profile: `python -m benchmarks.synchronisations`.

Plain trajectories wait for nothing. Adaptive ones wait once a step, from the first decision on, for the event behind the decision's copy,
since whether the network is called depends on it, and for nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from fastdiff_kernels.diffusion import AdaptiveSkip, EDMPrecond, FixedSkip, Schedule, sample

STEPS = 12
END = "the end of the run"
EVENT = "cudaEventSynchronize"
# Of CUDA's runtime, those that return only when the device has come to them. A copy to memory that is not pinned ends in the second.
WAITING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", EVENT, "cudaMemcpy", "cudaMemcpy2D", "cudaMalloc", "cudaFree")


@dataclass(frozen=True)
class Trajectory:
    """How samples are drawn, and how often the host may wait for an event."""

    solver: str
    skip: AdaptiveSkip | FixedSkip | None = None
    events: int = 0


TRAJECTORIES = {
    "euler": Trajectory("euler"),
    "heun": Trajectory("heun"),
    "dpmpp_2m": Trajectory("dpmpp_2m"),
    "euler, every second step": Trajectory("euler", FixedSkip(2)),
    **{
        f"euler, {mode}": Trajectory("euler", skip, STEPS - skip.first_decision)
        for mode, skip in (("official", AdaptiveSkip()), ("tensor", AdaptiveSkip(mode="tensor")))
    },
}


def calls(run: Callable[[], object], names: Sequence[str] = WAITING) -> dict[str, int]:
    """How often a second run of `run` makes each of the calls named."""
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    with profile(activities=activities) as recorded:
        run()
        # The profiler itself waits for the device when it ends.
        with record_function(END):
            pass
    events = recorded.profiler.kineto_results.events()
    end = min(e.start_ns() for e in events if e.name() == END)
    return dict(Counter(e.name() for e in events if e.name() in names and e.start_ns() < end))


class Network(nn.Conv2d):
    """Any network that does not wait by itself."""

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        return super().forward(x) + noise_level.view(-1, 1, 1, 1)


def draw(trajectory: Trajectory, device: str) -> Callable[[], Tensor]:
    """A few samples of an untrained network, as a call without arguments."""
    denoiser = EDMPrecond(Network(3, 3, 3, padding=1)).to(device)
    noise, schedule = torch.randn(4, 3, 16, 16, device=device), Schedule.karras(STEPS, 0.002, 80.0)
    return lambda: sample(denoiser, noise, schedule, solver=trajectory.solver, skip=trajectory.skip).samples


def excess(found: Mapping[str, int], trajectory: Trajectory) -> dict[str, int]:
    """The calls found that a trajectory has no reason for."""
    allowed = {EVENT: trajectory.events}
    return {name: count for name, count in found.items() if count > allowed.get(name, 0)}


def main() -> int:
    """Prints each trajectory's calls; the status is 1 where one waits without reason."""
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing here has to be waited for")
    wrong = False
    for name, trajectory in TRAJECTORIES.items():
        found = calls(draw(trajectory, "cuda"))
        unreasonable = excess(found, trajectory)
        print(f"{name:26} {found or 'waits for nothing'}{f', without reason {unreasonable}' if unreasonable else ''}")
        wrong |= bool(unreasonable)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
