"""The original DiT (Peebles and Xie, arXiv 2212.09748) and other models with its blocks or with timm's attention.

No host is imported: blocks are known by their parts, and each is compared with what replaces it before it is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_number, check_positive
from ..ops.attention import MAX_HEAD_DIM
from ._denoiser import ModelDenoiser, Noise
from ._duck import Shape, patch_shapes, unpatch_shapes
from ._report import PatchReport

__all__ = ["as_denoiser", "patch", "unpatch"]


class TimmAttention(Shape):
    """softmax(q k^T / sqrt(D)) v of one packed projection [B, N, 3, H, D], norms of q and k before it."""

    parts = ("qkv", "num_heads", "proj", "attn_drop", "proj_drop")
    folded = ("attn_drop",)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        width = module.qkv.out_features // 3 // module.num_heads
        if width > MAX_HEAD_DIM:
            return f"its head dimension {width} is above {MAX_HEAD_DIM}"
        return None if module.attn_drop.p == 0 else "it drops attention weights, which the op has no way to"

    @classmethod
    def example(cls, module: Any) -> tuple[Tensor, ...]:
        return (torch.randn(2, 5, module.qkv.in_features),)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A mask, is_causal, and whatever else newer versions take.
        if self.is_watched() or any(a is not None and a is not False for a in (*args, *kwargs.values())):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)  # [B, N, H, D] each, read in place
        q = q if getattr(self, "q_norm", None) is None else self.q_norm(q)
        k = k if getattr(self, "k_norm", None) is None else self.k_norm(k)
        attended = cast(Tensor, ops.attention(q.to(v.dtype), k.to(v.dtype), v)).flatten(2)
        attended = attended if getattr(self, "norm", None) is None else self.norm(attended)
        return self.proj_drop(self.proj(attended))


class AdaLNBlock(Shape):
    """x + gate attn(LN(x) (1 + scale) + shift), then the same with the MLP: the adaLN-Zero block."""

    parts = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")
    folded = ("norm1", "norm2")

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return _plain_norms(module.norm1, module.norm2)

    @classmethod
    def example(cls, module: Any) -> tuple[Tensor, ...]:
        return torch.randn(2, 5, _width(module.norm1)), torch.randn(2, _condition(module))

    def forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
        if self.is_watched():
            return super().forward(x, c)  # type: ignore[misc]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _chunks(self.adaLN_modulation(c), 6, x)
        attended = self.attn(ops.layer_norm_modulate(x, shift, scale, eps=self.norm1.eps))
        # Under autocast the branches come in 16 bits, and the stream is wider.
        x, modulated = ops.gate_residual_norm_modulate(x, attended.to(x.dtype), gate, shift_mlp, scale_mlp, eps=self.norm2.eps)
        return ops.gate_residual(x, self.mlp(modulated).to(x.dtype), gate_mlp)


class AdaLNOutput(Shape):
    """linear(LN(x) (1 + scale) + shift): the last layer."""

    parts = ("norm_final", "linear", "adaLN_modulation")
    folded = ("norm_final",)

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return _plain_norms(module.norm_final)

    @classmethod
    def example(cls, module: Any) -> tuple[Tensor, ...]:
        return torch.randn(2, 5, _width(module.norm_final)), torch.randn(2, _condition(module))

    def forward(self: Any, x: Tensor, c: Tensor) -> Tensor:
        if self.is_watched():
            return super().forward(x, c)  # type: ignore[misc]
        shift, scale = _chunks(self.adaLN_modulation(c), 2, x)
        return self.linear(ops.layer_norm_modulate(x, shift, scale, eps=self.norm_final.eps))


SHAPES = (TimmAttention, AdaLNBlock, AdaLNOutput)


def patch(model: nn.Module) -> PatchReport:
    """Replaces adaLN-Zero blocks, the last layer and timm's attention by this package's ops, in place.

    Blocks become three passes over memory for all of norm, modulation, gate and residual beside attention and MLP. Objects, parameters,
    hooks and `isinstance` stay as they are; a pickle of the whole model, unlike its state dict, wants it unpatched.

    Returns:
        PatchReport: every module, replaced with what, or left and why.

    Raises:
        TypeError: model is not a module.
    """
    return patch_shapes(_checked(model), SHAPES)


def unpatch(model: nn.Module) -> None:
    """Undoes `patch`.

    Raises:
        TypeError: model is not a module. RuntimeError: a module's forward was replaced since, by offloading hooks.
    """
    unpatch_shapes(_checked(model), SHAPES)


def as_denoiser(
    model: nn.Module,
    *,
    betas: Tensor | None = None,
    sigma_data: float = 1.0,
    guidance: float = 1.0,
    null_class: int | None = None,
) -> ModelDenoiser:
    """The model, called as model(x, t, y) and predicting noise, as `denoiser(x, sigma, class_labels=...) -> E[x0 | x]`.

    Args:
        model: returns the noise prediction [B, C, ...], or 2 C channels, the second half of which is its variance.
        betas: floating [T], T >= 2, in (0, 1], of the discrete process; None is what DiT was trained with, 1000 from 1e-4 to 0.02,
            linearly.
        sigma_data: standard deviation of the data.
        guidance, null_class: of classifier-free guidance; the class that stands for none.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range; guidance without null_class.
    """
    if check_number(guidance, "guidance") != 1 and null_class is None:
        raise ValueError(f"guidance needs null_class, which is None; got guidance = {guidance}")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64) if betas is None else _checked_betas(betas)
    absent: Mapping[str, Tensor] | None = None if null_class is None else {"class_labels": torch.tensor([null_class])}
    parametrisation = Noise((1 - betas).cumprod(0))
    return ModelDenoiser(_checked(model), parametrisation, check_positive(sigma_data, "sigma_data"), guidance, absent, _call)


def _call(model: nn.Module, x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
    return model(x, time, class_labels)


def _chunks(modulation: Tensor, count: int, x: Tensor) -> tuple[Tensor, ...]:
    wider = torch.promote_types(modulation.dtype, x.dtype) == x.dtype
    return (modulation.to(x.dtype) if wider else modulation).chunk(count, dim=1)


def _plain_norms(*norms: Any) -> str | None:
    for norm in norms:
        if not isinstance(norm, nn.LayerNorm):
            return f"its norm is a {type(norm).__name__}"
        if norm.weight is not None:
            return "its LayerNorm has weights of its own beside the modulation"
    return None


def _width(norm: Any) -> int:
    return norm.normalized_shape[0]


def _condition(module: Any) -> int:
    linear = [layer for layer in module.adaLN_modulation.modules() if isinstance(layer, nn.Linear)]
    return linear[0].in_features


def _checked_betas(betas: Tensor) -> Tensor:
    if not isinstance(betas, Tensor) or not betas.is_floating_point():
        raise TypeError(f"betas must be a floating-point tensor, got {betas.dtype if isinstance(betas, Tensor) else type(betas).__name__}")
    if betas.dim() != 1 or len(betas) < 2:
        raise ValueError(f"betas must have shape [T] with T >= 2, got {list(betas.shape)}")
    betas = betas.detach().double().cpu()
    outside = betas[~((betas > 0) & (betas <= 1))]
    if len(outside):
        raise ValueError(f"betas must lie in (0, 1], got {outside[0].item()}")
    return betas


def _checked(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model
