"""What there is to measure: an op at the shape of a network, in a dtype and a mode, by several providers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MODES = ("forward", "fwd+bwd")
# What `--quick` measures: every op, at one network of those of a like size.
QUICK = (
    "DiT-XL/2", "DiT-S/2", "DiT", "EDM", "EDM-16", "EDM2", "SD-U-Net",
    "CIFAR-10", "64 px", "pixels", "digits", "pchip", "linear", "decisions", "sweep",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """Something else than eager, for the same purpose: its results differ from eager's by design, and have a definition of their own."""

    run: Callable
    definition: Callable
    """The same in PyTorch calls; in float64 it is the truth."""
    per_thousand: Callable[[], float] | None = None
    """As the workload's."""


@dataclass(frozen=True)
class Workload:
    """One op at one shape. Every callable takes what `inputs` made, cast to a dtype and on a device, and returns a tensor or several."""

    op: str
    network: str
    shape: tuple[int, ...] | str
    inputs: Callable[[], list[Any]]
    """Float32 tensors on the CPU, and constants."""
    eager: Callable
    """The composition of PyTorch calls that a user has otherwise; in float64 it is the truth."""
    ours: Callable
    gradients: tuple[int, ...] = ()
    """Which inputs are differentiated; without any, forward is the only mode."""
    rivals: Mapping[str, Callable] = field(default_factory=dict)
    """What a user could pick instead, by name."""
    forward_rivals: Mapping[str, Callable] = field(default_factory=dict)
    """Such of them as have no gradients."""
    variants: Mapping[str, Variant] = field(default_factory=dict)
    """Other ways to the same end, by name; without gradients."""
    per_thousand: Callable[[], float] | None = None
    """How many calls a thousand samples take, where the workload draws samples; its speed-ups are then of the time for these."""
    recorded: bool = False
    """Whether forward writes the gradients as well, wherever that does not underflow: backward then multiplies them, and reads no input."""
    streams: bool = True
    """Whether its inputs and outputs are what it moves; a network that is not among its inputs moves far more."""
    captured: bool = True
    """Whether a GPU can record a call as a graph: not where the host reads results or draws random numbers."""
    flops: Callable[..., int] | None = None
    """Floating-point operations of one forward call, where they are more than the bytes."""
    backward_flops: float = 2.0
    """Operations of backward as a multiple of forward's."""
    checkable: Callable | None = None
    """What is compared with instead of eager, and stands for the truth in float64, where eager draws random numbers of its own."""
    factor: float = 2.0
    """How much farther than eager from the truth a provider may be; torch.compile adds in other orders than eager."""
    compiled: bool = True
    """Whether eager can be compiled."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def quick(w: Workload) -> bool:
    """Whether `--quick` measures it."""
    return any(w.network == name or w.network.startswith(f"{name} ") for name in QUICK)


@dataclass(frozen=True)
class Case:
    """A workload in one dtype and one mode."""

    workload: Workload
    dtype: torch.dtype
    mode: str

    def __str__(self) -> str:
        w = self.workload
        shape = w.shape if isinstance(w.shape, str) else "x".join(map(str, w.shape))
        return f"{w.op} {w.network} {shape} {str(self.dtype).removeprefix('torch.')} {self.mode}"

    def inputs(self, dtype: torch.dtype, device: str, like: Sequence[Any] | None = None) -> list[Any]:
        """Fresh inputs, or those of `like`, with leaves to differentiate where the mode asks for them."""
        moved = [
            a.to(device, dtype if a.is_floating_point() else None) if isinstance(a, Tensor) else a for a in like or self.workload.inputs()
        ]
        if self.mode == "fwd+bwd":
            for i in self.workload.gradients:
                moved[i] = moved[i].detach().requires_grad_()
        return moved

    def bind(self, provider: Callable, args: Sequence[Any], upstream: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """provider at these inputs as a call without arguments: its outputs, and the gradients in the mode that has them."""
        leaves = [args[i] for i in self.workload.gradients]

        def forward() -> tuple[Tensor, ...]:
            return as_tuple(provider(*args))

        def forward_backward() -> tuple[Tensor, ...]:
            outputs = as_tuple(provider(*args))
            return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

        return forward if self.mode == "forward" else forward_backward

    def bytes(self, args: Sequence[Any], results: Sequence[Tensor]) -> int:
        """What our kernels move, whoever is timed: each input and output once; in backward the inputs and the outputs' gradients are read
        and the inputs' gradients written, or the recorded ones written in forward, then read and written again.
        """
        split = len(results) - (len(self.workload.gradients) if self.mode == "fwd+bwd" else 0)
        inputs, outputs, gradients = (
            sum(t.numel() * t.element_size() for t in part if isinstance(t, Tensor)) for part in (args, results[:split], results[split:])
        )
        forward = inputs + outputs
        if self.mode == "forward":
            return forward
        recorded = self.workload.recorded and self.dtype != torch.float16
        return forward + outputs + (3 * gradients if recorded else inputs + gradients)

    def flops(self, args: Sequence[Any]) -> int | None:
        w = self.workload
        if w.flops is None:
            return None
        return int(w.flops(*args) * (1 if self.mode == "forward" else 1 + w.backward_flops))


def as_tuple(value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def cases(workloads: Sequence[Workload], dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Every workload in each of these dtypes that it has, and in every mode."""
    return [
        Case(w, dtype, mode) for w in workloads for dtype in dtypes if dtype in w.dtypes for mode in (MODES if w.gradients else MODES[:1])
    ]
