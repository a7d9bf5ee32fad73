"""Drawing samples with DiT-XL/2, PixArt and EDM's U-Net, all of it: seconds for a thousand, plain and by each way there is to less.

Eager is a loop of Euler steps in PyTorch around the network as diffusers has it. "ours" is the same trajectory with the network patched
and `diffusion.sample`; beside it the ways that take fewer calls of the network, whose results are others and which are checked against
loops of their own. The weights are random, so that this is about time alone, and two things are set that a trained network would decide: a
threshold that every step passes makes every second step a reused one, and the schedule of 20 steps is Karras' with fewer levels, since an
optimised one of as many steps takes as long. What quality either costs is not to be seen here.

On a CPU a network has fewer layers, and a trajectory is cut to its first steps. The time for a thousand samples is then that of a call
times the steps left out, and times the ratio of the matrix products of the whole network to those of the one measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads import Variant, Workload
from fastdiff_kernels.diffusion import AdaptiveSkip, EDMPrecond, Schedule, sample
from fastdiff_kernels.integrations.diffusers import patch

GPU = torch.cuda.is_available()
STEPS, FEWER = 50, 20
# What of these a call measures.
CALL_STEPS, CALL_FEWER = (STEPS, FEWER) if GPU else (4, 2)
# A threshold that every step passes: reuse in every second step, decided by the criterion each time.
SKIP = AdaptiveSkip(threshold=1e9, max_skip=1, mode="tensor")
SIGMA_INIT = 2.5


@dataclass(frozen=True)
class Network:
    """A model of diffusers: build(layers), the layers that it has in truth, and how it is called."""

    build: Callable[[int], nn.Module]
    layers: int
    unit: str
    shape: tuple[int, ...]
    """Of one sample."""
    arguments: Callable[[int], dict[str, Any]]
    """For a batch."""
    batch: int = 16 if GPU else 1


def dit(layers: int) -> nn.Module:
    return diffusers.DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, num_layers=layers, sample_size=32)


def pixart(side: int) -> Callable[[int], nn.Module]:
    return lambda layers: diffusers.PixArtTransformer2DModel(
        num_attention_heads=16,
        num_layers=layers,
        sample_size=side,
        cross_attention_dim=1152,
        caption_channels=4096,
        use_additional_conditions=False,
    )


def captions(batch: int) -> dict[str, Any]:
    """Of which the first sample's fills its 120 places, the others' 40."""
    lengths = torch.tensor([[120]] + [[40]] * (batch - 1))
    return {
        "encoder_hidden_states": torch.randn(batch, 120, 4096),
        "encoder_attention_mask": (torch.arange(120) < lengths).long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def edm(layers: int) -> nn.Module:
    """Channels, resolutions and attention of EDM's DDPM++ for CIFAR-10."""
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(256, 256, 256),
        layers_per_block=layers,
        attention_head_dim=256,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


PIXART = ("PixArt-512", 64) if GPU else ("PixArt-256", 32)
NETWORKS = {
    "DiT-XL/2": Network(dit, 28, "blocks", (4, 32, 32), lambda batch: {"class_labels": torch.arange(batch) % 1000}),
    PIXART[0]: Network(pixart(PIXART[1]), 28, "blocks", (4, PIXART[1], PIXART[1]), captions),
    "EDM": Network(edm, 4, "blocks a level", (3, 32, 32), lambda batch: {}),
}


class Called(nn.Module):
    """A model of diffusers as EDMPrecond calls a network: the part of its output that predicts."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        return self.model(x, timestep=noise_level, **self.arguments, return_dict=False)[0][:, : x.shape[1]]


def called(network: Network, layers: int, device: str, dtype: torch.dtype) -> Called:
    torch.manual_seed(0)
    arguments = {
        name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in network.arguments(network.batch).items()
    }
    with torch.device(device):
        model = network.build(layers)
    return Called(model.to(dtype).eval().requires_grad_(False), arguments)


@functools.cache
def denoiser(name: str, dtype: torch.dtype, patched: bool, compiled: bool = False) -> EDMPrecond:
    network = NETWORKS[name]
    inner = called(network, network.layers if GPU else 1, "cuda" if GPU else "cpu", dtype)
    if patched:
        patch(inner.model)
    if compiled:
        inner.model = torch.compile(inner.model, dynamic=False)  # type: ignore[assignment]
    return EDMPrecond(inner)


@functools.cache
def whole_over_measured(name: str) -> float:
    """Matrix products of the network over those of the one that is measured."""
    network = NETWORKS[name]
    counts = []
    for layers in (network.layers, network.layers if GPU else 1):
        model = called(network, layers, "meta", torch.float32)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(network.batch, *network.shape, device="meta"), torch.empty(network.batch, device="meta"))
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]


def schedule(steps: int) -> Schedule:
    return Schedule.karras(steps, 0.002, 80.0)


def reused(steps: int) -> list[bool]:
    """Which steps the rule reuses: for this threshold the same ones along every trajectory."""
    return sample(lambda x, sigma: x / 2, torch.randn(1, 4), schedule(steps), solver="euler", skip=SKIP).skipped.tolist()


@torch.no_grad()
def plain(name: str, noise: Tensor, steps: int, reuse: Sequence[bool] = (), compiled: bool = False) -> Tensor:
    """Euler steps in PyTorch, of which some go on in the direction of the one before."""
    network, levels = denoiser(name, noise.dtype, False, compiled), schedule(steps).sigmas.tolist()
    x = noise * levels[0]
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if not (reuse and reuse[i]):
            direction = (x - network(x, sigma)) / sigma
        x = x + (sigma_next - sigma) * direction
    return x


def ours(name: str, noise: Tensor, steps: int, skip: AdaptiveSkip | None = None, compiled: bool = False) -> Tensor:
    return sample(denoiser(name, noise.dtype, True, compiled), noise, schedule(steps), solver="euler", skip=skip).samples


@torch.no_grad()
def one_step(name: str, noise: Tensor, patched: bool) -> Tensor:
    """A distilled generator's only call."""
    return denoiser(name, noise.dtype, patched)(SIGMA_INIT * noise, SIGMA_INIT)


def workload(name: str) -> Workload:
    network = NETWORKS[name]
    plan, whole_plan = reused(CALL_STEPS), reused(STEPS)

    def per_thousand(part: float) -> Callable[[], float]:
        return lambda: 1000 / network.batch * part * whole_over_measured(name)

    of_layers = "" if GPU else f", 1 of {network.layers} {network.unit}"
    of_steps = f"{STEPS} steps" if GPU else f"{CALL_STEPS} of {STEPS} steps"
    compiled = {
        "compile": lambda noise: plain(name, noise, CALL_STEPS, compiled=True),
        "ours-compiled": lambda noise: ours(name, noise, CALL_STEPS, compiled=True),
    }
    return Workload(
        "sampling",
        name,
        f"B={network.batch}, {of_steps}{of_layers}",
        lambda: [torch.randn(network.batch, *network.shape)],
        lambda noise: plain(name, noise, CALL_STEPS),
        lambda noise: ours(name, noise, CALL_STEPS),
        # The compiler takes minutes for a whole network on a CPU.
        rivals=compiled if GPU else {},
        variants={
            f"ours, {whole_plan.count(True)} of {STEPS} steps skipped": Variant(
                lambda noise: ours(name, noise, CALL_STEPS, skip=SKIP),
                lambda noise: plain(name, noise, CALL_STEPS, plan),
                # By the calls of the network, which is nearly all the time: the rule computes the first steps of any trajectory.
                per_thousand(whole_plan.count(False) / plan.count(False)),
            ),
            f"ours, schedule of {FEWER} steps": Variant(
                lambda noise: ours(name, noise, CALL_FEWER),
                lambda noise: plain(name, noise, CALL_FEWER),
                per_thousand(FEWER / CALL_FEWER),
            ),
            "ours, one step": Variant(
                lambda noise: one_step(name, noise, True), lambda noise: one_step(name, noise, False), per_thousand(1)
            ),
        },
        per_thousand=per_thousand(STEPS / CALL_STEPS),
        compiled=False,
        captured=False,
        streams=False,
        factor=8.0,
        dtypes=(torch.float32, torch.bfloat16),
    )


WORKLOADS = [workload(name) for name in NETWORKS]


def test_speed(case, measure):
    measure(case)
