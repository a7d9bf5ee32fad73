"""k-diffusion: its denoiser wrappers, and the blocks of its hourglass transformer (HDiT, Crowson et al., arXiv 2401.11605).

No host is imported. Its convention is this package's, model(x, sigma, **extra_args) -> E[x0 | x] for unscaled x: a denoiser of this package
goes into `sample_*` as it is, beside `Schedule.to_k_diffusion()` for its levels. Blocks are known by their parts, and each is compared with
what replaces it before it is replaced.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_positive
from ..diffusion._checks import batched_sigma, check_samples, per_sample
from ..ops.attention import MAX_HEAD_DIM
from ._duck import Shape, patch_shapes, unpatch_shapes
from ._report import PatchReport

__all__ = ["WrappedDenoiser", "as_denoiser", "patch", "unpatch"]


class HDiTAttention(Shape):
    """x + W attention between queries and keys of length sqrt(scale), rotated: the block with global attention.

    Angles are the heads' own, and turn half of a head's channels.
    """

    parts = ("norm", "qkv_proj", "scale", "pos_emb", "dropout", "out_proj", "n_heads", "d_head")

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        for window in ("kernel_size", "window_size"):
            if hasattr(module, window):
                return f"it attends within a {window} of {getattr(module, window)}, which no op here does; its norm is replaced"
        if module.d_head > MAX_HEAD_DIM:
            return f"its head dimension {module.d_head} is above {MAX_HEAD_DIM}"
        return None if module.d_head % 4 == 0 else f"its head dimension {module.d_head} has no halves of pairs"

    @classmethod
    def prepare(cls, module: Any) -> None:
        module.scale.abs_()

    @classmethod
    def example(cls, module: Any) -> tuple[Tensor, ...]:
        width = module.qkv_proj.in_features
        return torch.randn(2, 3, 2, width), torch.randn(3, 2, 2), torch.randn(2, module.norm.linear.in_features)

    def forward(self: Any, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        if x.dim() != 4 or pos.dim() != 3:
            return super().forward(x, pos, cond)  # type: ignore[misc]
        qkv = self.qkv_proj(self.norm(x, cond)).flatten(1, 2).unflatten(2, (3, self.n_heads, self.d_head))
        q, k, v = qkv.unbind(2)  # [B, N, H, D] each, read in place
        # sqrt(scale / (|q|^2 + eps)) of both: their mean square is |q|^2 / D.
        q, k = ops.qk_norm_rope(q, k, eps=1e-6 / self.d_head)
        q = q * (self.scale / self.d_head).to(q.dtype)[:, None]
        q, k = _turned(q, k, self.pos_emb(pos.flatten(0, 1).to(q.dtype)))
        attended = cast(Tensor, ops.attention(q, k, v, scale=1.0)).flatten(2)  # [B, N, C]
        return self.out_proj(self.dropout(attended.unflatten(1, x.shape[1:3]))) + x


class AdaRMSNorm(Shape):
    """x / rms(x) (1 + W cond), of pixels [B, H, W, C]."""

    parts = ("linear", "eps")

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return None if isinstance(module.linear, nn.Linear) else f"its linear is a {type(module.linear).__name__}"

    @classmethod
    def example(cls, module: Any) -> tuple[Tensor, ...]:
        return torch.randn(2, 3, 2, module.linear.out_features), torch.randn(2, module.linear.in_features)

    def forward(self: Any, x: Tensor, cond: Tensor) -> Tensor:
        scale = self.linear(cond)
        if x.dim() != 4 or scale.dim() != 2:
            return super().forward(x, cond)  # type: ignore[misc]
        scale = scale if scale.dtype == torch.float32 else scale.to(x.dtype)
        return ops.rms_norm_modulate(x.flatten(1, 2), None, None, scale, eps=self.eps).view(x.shape)


SHAPES = (HDiTAttention, AdaRMSNorm)


def patch(model: nn.Module) -> PatchReport:
    """Replaces global attention blocks and conditional norms of HDiT by this package's ops, in place.

    Blocks that attend within neighbourhoods or shifted windows keep their attention. Objects, parameters, hooks and `isinstance` stay as
    they are; a pickle of the whole model, unlike its state dict, wants it unpatched.

    Returns:
        PatchReport: every module, replaced with what, or left and why.

    Raises:
        TypeError: model is not a module.
    """
    return patch_shapes(_checked(model, "model"), SHAPES)


def unpatch(model: nn.Module) -> None:
    """Undoes `patch`.

    Raises:
        TypeError: model is not a module. RuntimeError: a module's forward was replaced since, by offloading hooks.
    """
    unpatch_shapes(_checked(model, "model"), SHAPES)


def as_denoiser(wrapper: nn.Module, *, sigma_data: float | None = None) -> WrappedDenoiser:
    """k-diffusion's denoiser wrapper (`Denoiser`, `VDenoiser`, `DiscreteEpsDDPMDenoiser`, ...) with the `.raw` and `.sigma_data` that
    `optimize_schedule` and the distillers ask for.

    Args:
        wrapper: called as wrapper(x, sigma [B], **conditioning) -> E[x0 | x].
        sigma_data: standard deviation of the data; None is the wrapper's own, or 1.

    Raises:
        TypeError, ValueError: wrapper is no module; sigma_data is not a positive number.
    """
    if sigma_data is None:
        own: Any = getattr(_checked(wrapper, "wrapper"), "sigma_data", 1.0)
        sigma_data = float(own)
    return WrappedDenoiser(_checked(wrapper, "wrapper"), check_positive(sigma_data, "sigma_data"))


class WrappedDenoiser(nn.Module):
    """What `as_denoiser` returns. Attributes: wrapper, sigma_data."""

    def __init__(self, wrapper: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.wrapper = wrapper
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: float | Tensor, **conditioning: Any) -> Tensor:
        """E[x0 | x] in the wider of x's and the wrapper's dtype, for x [B, ...] unscaled and sigma > 0, a number, 0-d or [B]."""
        denoised = self.wrapper(x, batched_sigma(sigma, check_samples(x, "x")), **conditioning)
        return denoised.to(torch.promote_types(denoised.dtype, x.dtype))

    def raw(self, x: Tensor, sigma: float | Tensor, **conditioning: Any) -> Tensor:
        """F = (D - c_skip x) / c_out; arguments as in `forward`.

        Wrappers show no raw output that is the same for all of them, so that F is formed from D, in float64: its rounding error is that
        of D divided by sigma, which a float32 network feels below sigma = 0.01 sigma_data.
        """
        sigma = batched_sigma(sigma, check_samples(x, "x"))
        denoised = self.wrapper(x, sigma, **conditioning).double()
        s = sigma.double()
        variance = s**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / variance, s * self.sigma_data * variance.rsqrt()
        raw = (denoised - per_sample(c_skip, x) * x.double()) / per_sample(c_out, x)
        return raw.to(torch.promote_types(x.dtype, torch.float32))

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}"


def _turned(q: Tensor, k: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, [B, N, H, D] contiguous, with channels (i, D/4 + i) of every head turned by theta [N, H, D/4], and the rest as it is."""
    theta = theta.float() if theta.itemsize < 4 else theta
    # Halves of heads are tokens to the op, each with angles of its own: those that stay turn by 0.
    angles = torch.stack((theta, torch.zeros_like(theta)), 2).flatten(0, 2)  # [N H 2, D/4]
    first, second = (x.reshape(x.shape[0], -1, 1, x.shape[3] // 2) for x in (q, k))
    turned = ops.qk_norm_rope(first, second, None, None, angles.cos(), angles.sin(), norm=None, rope="half")
    return turned[0].view(q.shape), turned[1].view(k.shape)


def _checked(module: nn.Module, name: str) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
    return module
