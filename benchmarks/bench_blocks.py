"""Whole blocks with their projections, at the shapes of DiT-XL/2, PixArt-512, EDM, EDM2-S and SD3: matrix products bound most of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads import Workload
from fastdiff_kernels.nn import DiTBlock, EDM2AttentionBlock, MMDiTBlock, PixArtBlock, UNetAttentionBlock
from fastdiff_kernels.reference import blocks as definitions

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(shapes: tuple[tuple[int, ...], ...], parameters: list[torch.Size]) -> list[Tensor]:
    """Activations of unit variance, and random parameters that keep it about there."""
    return [*map(torch.randn, shapes), *(torch.randn(s) * (s[1] ** -0.5 if len(s) > 1 else 0.1) for s in parameters)]


def workload(
    network: str,
    make: Callable[..., torch.nn.Module],
    definition: Callable[..., Any],
    shapes: tuple[tuple[int, ...], ...],
    widths: dict[str, int],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    **options: Any,
) -> Workload:
    """A block and its definition as functions of activations and parameters, with gradients for all of them."""
    with torch.device("meta"):
        block = make(**widths, **options)
    names, count = [name for name, _ in block.named_parameters()], len(shapes)

    def eager(*args: Tensor) -> Any:
        return definition(dict(zip(names, args[count:], strict=True)), *args[:count], **options)

    def ours(*args: Tensor) -> Any:
        return functional_call(block, dict(zip(names, args[count:], strict=True)), args[:count])

    def flops(*args: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            eager(*(a.detach().to("meta") for a in args))
        return counter.get_total_flops()

    return Workload(
        make.__name__,
        network,
        shapes[0],
        lambda: operands(shapes, [p.shape for p in block.parameters()]),
        eager,
        ours,
        gradients=tuple(range(count + len(names))),
        rivals={"ours-compiled": torch.compile(ours, dynamic=False)},
        flops=flops,
        # The compiler sums the gradient of a bias over all rows in one chain, ten times less exactly than eager.
        factor=32.0,
        dtypes=dtypes,
    )


WORKLOADS = [
    workload(
        "DiT-XL/2",
        DiTBlock,
        definitions.dit_block,
        ((4, 256, 1152), (4, 1152)),
        {"dim": 1152, "condition_dim": 1152},
        num_heads=16,
    ),
    workload(
        "PixArt-512",
        PixArtBlock,
        definitions.pixart_block,
        ((1, 1024, 1152), (1, 6, 1152), (1, 120, 1152)),
        {"dim": 1152},
        num_heads=16,
    ),
    workload(
        "EDM",
        UNetAttentionBlock,
        definitions.unet_attention_block,
        ((16, 256, 16, 16),),
        {"channels": 256},
        num_heads=1,
        num_groups=32,
        eps=1e-6,
        skip_scale=0.5**0.5,
    ),
    workload("EDM2-S", EDM2AttentionBlock, definitions.edm2_attention_block, ((16, 576, 16, 16),), {"channels": 576}, num_heads=9),
    workload(
        "SD3.5-medium",
        MMDiTBlock,
        definitions.mmdit_block,
        ((2, 4096, 1536), (2, 333, 1536), (2, 1536)),
        {"dim": 1536, "condition_dim": 1536},
        dtypes=(torch.bfloat16, torch.float16),  # seconds a call on a CPU, which measures in float32
        num_heads=24,
        qk_norm="rms",
    ),
]


def test_speed(case, measure):
    measure(case)
