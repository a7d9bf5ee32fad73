"""Networks of EDM (Karras et al., arXiv 2206.00364) and EDM2 (arXiv 2312.02696) as users have them.

No host is imported: blocks are known by their parts, and each is compared with what replaces it before it is replaced. All of a block but
its attention is still its own forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from .. import ops
from ..diffusion._checks import batched_sigma, check_samples, per_sample
from ..ops.attention import MAX_HEAD_DIM
from ._duck import Shape, patch_shapes, unpatch_shapes
from ._policy import pays
from ._report import PatchReport

__all__ = ["PreconditionedDenoiser", "as_denoiser", "patch", "unpatch"]


class EDMBlock(Shape):
    """A residual block that ends in attention: (x + W attention(qkv of its group norm)) skip_scale."""

    parts = ("norm0", "conv0", "affine", "norm1", "conv1", "num_heads", "skip_scale")

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return _no_attention(module) or _too_wide(module.conv1.weight.shape[0] // module.num_heads)

    @classmethod
    def example(cls, module: Any) -> tuple[Tensor, ...]:
        return torch.randn(2, module.norm0.weight.shape[0], 4, 4), torch.randn(2, module.affine.weight.shape[1])

    def forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        x = _without(self, {"num_heads": 0}, super().forward, x, emb)  # type: ignore[misc]
        q, k, v = _heads(self.qkv(self.norm2(x)), self.num_heads)
        return (_pixels(q, k, v, x, self.proj) + x) * self.skip_scale


class EDM2Block(Shape):
    """A magnitude-preserving residual block that ends in attention between normalised queries, keys and values."""

    parts = ("conv_res0", "emb_linear", "conv_res1", "num_heads", "attn_balance", "clip_act", "attn_qkv", "attn_proj")

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return _no_attention(module) or _too_wide(module.attn_proj.weight.shape[0] // module.num_heads)

    @classmethod
    def example(cls, module: Any) -> tuple[Tensor, ...]:
        entry = getattr(module, "conv_skip", None) or module.conv_res0
        return torch.randn(2, entry.weight.shape[1], 4, 4), torch.randn(2, module.emb_linear.weight.shape[1])

    def forward(self: Any, x: Tensor, emb: Tensor) -> Tensor:
        x = _without(self, {"num_heads": 0, "clip_act": None}, super().forward, x, emb)  # type: ignore[misc]
        q, k, v = ops.qkv_pixel_norm(*_heads(self.attn_qkv(x), self.num_heads), eps=1e-4)
        t = self.attn_balance
        x = x.lerp(_pixels(q, k, v, x, self.attn_proj), t) / math.hypot(1 - t, t)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)


class GroupNorm(Shape):
    """Group norm, with the codebase's own class."""

    parts = ("num_groups", "eps", "weight", "bias")

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        return None

    @classmethod
    def example(cls, module: Any) -> tuple[Tensor, ...]:
        return (torch.randn(2, module.weight.shape[0], 4, 4),)

    def forward(self: Any, x: Tensor) -> Tensor:
        # Inductor fuses a group norm with its surroundings, which it cannot do across an op.
        if torch.compiler.is_compiling() or not pays("group_norm", x):
            return super().forward(x)  # type: ignore[misc]
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, eps=self.eps, activation=None)


SHAPES = (EDMBlock, EDM2Block, GroupNorm)


def patch(net: nn.Module) -> PatchReport:
    """Replaces the attention of EDM's and EDM2's blocks, which those compute by einsum, and group norms by this package's ops, in place.

    Objects, parameters, hooks and `isinstance` stay as they are; a pickle of the whole network, unlike its state dict, wants it unpatched.

    Returns:
        PatchReport: every module, replaced with what, or left and why.

    Raises:
        TypeError: net is not a module.
    """
    return patch_shapes(_checked(net), SHAPES)


def unpatch(net: nn.Module) -> None:
    """Undoes `patch`.

    Raises:
        TypeError: net is not a module. RuntimeError: a module's forward was replaced since, by offloading hooks.
    """
    unpatch_shapes(_checked(net), SHAPES)


def as_denoiser(net: nn.Module) -> PreconditionedDenoiser:
    """The preconditioned network net(x, sigma, class_labels) as `denoiser(x, sigma, class_labels=...)` with `.raw` and `.sigma_data`.

    Args:
        net: has `sigma_data` and, as `model` or `unet`, the raw network F, called as F(c_in x, ln(sigma) / 4, class_labels). With a
            `label_dim` its labels are one-hot; class indices are made so, and both the index `label_dim` and no labels at all are
            zeros, the network without a class. A `label_dim` of 0 ignores labels, as the network itself does.

    Raises:
        TypeError: net is not a module, or has no raw network or no sigma_data.
    """
    inner = next((part for part in ("model", "unet") if isinstance(getattr(_checked(net), part, None), nn.Module)), None)
    if inner is None or not hasattr(net, "sigma_data"):
        raise TypeError(f"net must have sigma_data and a raw network, model or unet; {type(net).__name__} lacks one")
    return PreconditionedDenoiser(net, inner)


class PreconditionedDenoiser(nn.Module):
    """What `as_denoiser` returns. Attributes: net; sigma_data, the network's."""

    def __init__(self, net: nn.Module, inner: str) -> None:
        super().__init__()
        self.net = net
        self.inner = inner
        self.sigma_data = float(cast(float, net.sigma_data))
        self.checked = False

    def forward(self, x: Tensor, sigma: float | Tensor, class_labels: Tensor | None = None) -> Tensor:
        """E[x0 | x] in x's dtype, for x [B, C, H, W] unscaled and sigma > 0, a number, 0-d or [B]."""
        sigma = batched_sigma(sigma, check_samples(x, "x"))
        return self.net(x, sigma, self._labels(class_labels, x)).to(x.dtype)

    def raw(self, x: Tensor, sigma: float | Tensor, class_labels: Tensor | None = None) -> Tensor:
        """F = (D - c_skip x) / c_out, from the raw network itself; arguments as in `forward`.

        Raises:
            RuntimeError: c_skip x + c_out F is not what the network returns, at the first call: its preconditioning is another.
        """
        sigma = batched_sigma(sigma, check_samples(x, "x"))
        labels = self._labels(class_labels, x)
        if not self.checked:
            self._check(x, sigma, labels)
        return self._raw(x, sigma, labels)

    def _raw(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        scaled = per_sample((sigma**2 + self.sigma_data**2).rsqrt(), x) * x
        if getattr(self.net, "use_fp16", False) and x.is_cuda:
            scaled = scaled.half()
        return getattr(self.net, self.inner)(scaled, sigma.log() / 4, labels).to(torch.promote_types(x.dtype, torch.float32))

    def _labels(self, labels: Tensor | None, x: Tensor) -> Tensor | None:
        width = getattr(self.net, "label_dim", None)
        if width is None:
            return labels
        if width == 0:
            return None
        if labels is None:
            return torch.zeros(1, width, device=x.device)
        return labels.float() if labels.is_floating_point() else one_hot(labels, width + 1)[..., :width].float()

    @torch.no_grad()
    def _check(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> None:
        variance = sigma**2 + self.sigma_data**2
        # While training two calls differ by their dropout, and each of EDM2's writes its weights.
        with _evaluating(self.net):
            returned, raw = self.net(x, sigma, labels), self._raw(x, sigma, labels)
        denoised = per_sample(self.sigma_data**2 / variance, x) * x + per_sample(sigma * self.sigma_data * variance.rsqrt(), x) * raw
        # Networks may run in 16 bits inside.
        if not torch.allclose(denoised.to(returned.dtype), returned, rtol=0.05, atol=0.05 * float(returned.abs().max())):
            raise RuntimeError(f"{type(self.net).__name__} does not return c_skip x + c_out F: its preconditioning is not EDM's")
        self.checked = True


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """`net.eval()` within, and every module as it was afterwards."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _without(module: Any, attributes: dict[str, Any], forward: Any, *args: Tensor) -> Tensor:
    """The module's own forward with other values of its attributes."""
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        return forward(*args)
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, N, H, D] each, of a projection [B, H D 3, ...] that is read in place."""
    parts = qkv.flatten(2).unflatten(1, (heads, -1, 3))  # [B, H, D, 3, N]
    q, k, v = parts.permute(3, 0, 4, 1, 2).unbind(0)
    return q, k, v


def _pixels(q: Tensor, k: Tensor, v: Tensor, like: Tensor, project: nn.Module) -> Tensor:
    attended = cast(Tensor, ops.attention(q, k, v)).flatten(2)  # [B, N, C]
    return project(attended.transpose(1, 2).reshape(like.shape))


def _no_attention(module: Any) -> str | None:
    return None if module.num_heads else "it has no attention; its norms are replaced one by one, its SiLUs are in its forward"


def _too_wide(width: int) -> str | None:
    return f"its head dimension {width} is above {MAX_HEAD_DIM}" if width > MAX_HEAD_DIM else None


def _checked(net: nn.Module) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    return net
