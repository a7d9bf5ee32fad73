"""Every block with its definition and inputs, small: what the tests of blocks run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff_kernels.nn import DiTBlock, EDM2AttentionBlock, MMDiTBlock, PixArtBlock, UNetAttentionBlock, axial_rope
from fastdiff_kernels.reference import blocks as definitions

B, N, M, C, HEADS, E = 3, 6, 5, 16, 2, 12
TOKENS, TEXT, CONDITION, MAP = (B, N, C), (B, M, C), (B, E), (B, C, 2, 3)


@dataclass(frozen=True)
class Case:
    """How to make a block, what defines it, and the shapes of what it is called with; `constants` follow the tensors of these shapes."""

    block: Callable[..., nn.Module]
    definition: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    constants: tuple[Any, ...] = ()
    widths: dict[str, Any] = field(default_factory=dict)
    """Options of the block that the definition reads off the parameters."""

    def make(self, dtype: torch.dtype = torch.float64, **more: Any) -> nn.Module:
        """The block, all parameters random, so that branches that start at zero count."""
        block = self.block(**self.widths, **self.options, **more)
        generator = torch.Generator().manual_seed(0)
        for parameter in block.parameters():
            parameter.data = (torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3).to(dtype)
        return block

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Any, ...]:
        """Random tensors of a seed, and the constants."""
        generator = torch.Generator().manual_seed(seed)
        return (*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in self.shapes), *self.constants)

    def define(self, parameters: dict[str, Tensor], *inputs: Any) -> Any:
        """The definition's result."""
        return self.definition(parameters, *inputs, **self.options)


_DIT = partial(Case, DiTBlock, definitions.dit_block, (TOKENS, CONDITION), widths={"dim": C, "condition_dim": E, "mlp_ratio": 2.0})
_PIXART = partial(Case, PixArtBlock, definitions.pixart_block, widths={"dim": C, "mlp_ratio": 2.0})
_MMDIT = partial(
    Case, MMDiTBlock, definitions.mmdit_block, (TOKENS, TEXT, CONDITION), widths={"dim": C, "condition_dim": E, "mlp_ratio": 2.0}
)
_UNET = partial(Case, UNetAttentionBlock, definitions.unet_attention_block, (MAP,), widths={"channels": C})
_EDM2 = partial(Case, EDM2AttentionBlock, definitions.edm2_attention_block, (MAP,), widths={"channels": C})

CASES = {
    "dit": _DIT(options={"num_heads": HEADS}),
    "dit_rms_rope": _DIT(options={"num_heads": HEADS, "qk_norm": "rms"}, constants=(axial_rope(2, 3, C // HEADS),)),
    "dit_layer": _DIT(options={"num_heads": HEADS, "qk_norm": "layer"}),
    "pixart": _PIXART((TOKENS, (B, 6, C), TEXT), {"num_heads": HEADS}, (torch.tensor([5, 1, 3]),)),
    "pixart_layer_heads": Case(
        PixArtBlock,
        definitions.pixart_block,
        (TOKENS, (B, 6 * C), (B, M, 8)),
        {"num_heads": HEADS, "qk_norm": "layer_heads"},
        widths={"dim": C, "context_dim": 8, "mlp_ratio": 2.0},
    ),
    "unet": _UNET(options={"num_heads": HEADS, "num_groups": 4}),
    "unet_edm": _UNET(options={"num_heads": 1, "num_groups": 4, "qk_norm": "rms", "eps": 1e-6, "skip_scale": 0.5**0.5}),
    "edm2": _EDM2(options={"num_heads": HEADS}),
    "edm2_clipped": _EDM2(options={"num_heads": HEADS, "balance": 0.5, "clip": 1.0}),
    "mmdit": _MMDIT(options={"num_heads": HEADS}),
    "mmdit_rms": _MMDIT(options={"num_heads": HEADS, "qk_norm": "rms"}),
    "mmdit_last": _MMDIT(options={"num_heads": HEADS, "qk_norm": "rms", "context_pre_only": True}),
}
NETWORKS = ("dit_rms_rope", "pixart", "unet_edm", "edm2", "mmdit_rms")
"""One case of each block."""

every_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
every_block = pytest.mark.parametrize("case", [pytest.param(CASES[name], id=name) for name in NETWORKS])


def tensors_of(outputs: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    """The tensors among outputs."""
    return [o for o in ((outputs,) if isinstance(outputs, Tensor) else outputs) if o is not None]


def results(fn: Callable[..., Any], parameters: list[Tensor], inputs: tuple[Any, ...]) -> list[Tensor]:
    """Outputs of fn(*inputs), then the gradients of a random projection of them for the parameters and the floating inputs."""
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = tensors_of(fn(*inputs))
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, [*parameters, *leaves], upstream)
    return [*(o.detach() for o in outputs), *gradients]


def defined(case: Case, block: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """`results` of the definition at the block's parameters, computed in dtype."""
    parameters = {name: p.detach().to(dtype or p.dtype).requires_grad_() for name, p in block.named_parameters()}
    cast = tuple(x.detach().to(dtype or x.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    return results(lambda *a: case.define(parameters, *a), list(parameters.values()), cast)
