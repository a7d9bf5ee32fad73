"""Networks as users of DiT, EDM, EDM2 and HDiT have them, from the papers, with the names, arguments and habits of the published code.

Unlike that code they compute in the dtype of their input, so that float64 gives the truth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention, silu


def waves(t: Tensor, width: int) -> Tensor:
    """Cosines and sines of t [B] at frequencies from 1 to 1e-4."""
    frequencies = torch.exp(torch.arange(width // 2, dtype=t.dtype, device=t.device) * (-math.log(10000) / (width // 2)))
    return torch.cat(((t[:, None] * frequencies).cos(), (t[:, None] * frequencies).sin()), 1)


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Attention(nn.Module):
    """timm's multi-head self-attention from one packed projection. Its blocks pass both optional arguments in every call."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.norm, self.proj_drop = nn.Dropout(0.0), nn.Identity(), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(self.norm(attended.transpose(1, 2).flatten(2))))


class Block(nn.Module):
    """timm's, of a vision transformer."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return x + self.mlp(self.norm2(x))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """adaLN-Zero (Peebles and Xie, section 3.2)."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = Attention(hidden_size, num_heads, qk_norm), Mlp(hidden_size, 4 * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(waves(t.to(self.mlp[0].weight.dtype), self.frequency_embedding_size))


class LabelEmbedder(nn.Module):
    """The last row is the class that labels are dropped to while training."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table, self.num_classes, self.dropout_prob = nn.Embedding(num_classes + 1, hidden_size), num_classes, dropout_prob

    def forward(self, labels: Tensor, train: bool) -> Tensor:
        dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
        return self.embedding_table(labels.masked_fill(dropped, self.num_classes) if train and self.dropout_prob else labels)


class DiT(nn.Module):
    """model(x, t, y): noise and variance of x [B, C, S, S]."""

    def __init__(
        self,
        input_size: int = 6,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 36,
        depth: int = 2,
        num_heads: int = 2,
        class_dropout_prob: float = 0.0,
        num_classes: int = 10,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.out_channels = patch_size, 2 * in_channels
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.randn(1, (input_size // patch_size) ** 2, hidden_size) / 10, requires_grad=False)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        size = x.shape[2]
        tokens = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            tokens = block(tokens, c)
        return F.fold(self.final_layer(tokens, c).transpose(1, 2), size, self.patch_size, stride=self.patch_size)


def persistent(kind: Any) -> Any:
    """As NVIDIA's code has its classes: copies and pickles are of the class that was decorated, whatever an object has become since."""

    def reduce(self: Any) -> tuple[Any, ...]:
        return _revived, (kind, self.__dict__)

    kind.__reduce__ = reduce
    return kind


def _revived(kind: Any, state: dict[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    module.__setstate__(state)
    return module


@persistent
class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / in_features**0.5)
        self.bias = nn.Parameter(torch.randn(out_features) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


@persistent
class Conv2d(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel) / (in_channels * kernel**2) ** 0.5)
        self.bias = nn.Parameter(torch.randn(out_channels) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.weight.shape[-1] // 2)


@persistent
class GroupNorm(nn.Module):
    """A group norm of one's own."""

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = min(32, num_channels // 4), eps
        self.weight, self.bias = nn.Parameter(torch.ones(num_channels)), nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


@persistent
class UNetBlock(nn.Module):
    """EDM's residual block (arXiv 2206.00364, appendix F.2): norm, SiLU, convolution; twice; attention; sums scaled by skip_scale."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, num_heads: int, adaptive_scale: bool = True) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.emb_channels = in_channels, out_channels, emb_channels
        self.num_heads, self.adaptive_scale, self.skip_scale, self.dropout = num_heads, adaptive_scale, 0.5**0.5, 0.1
        self.norm0, self.norm1 = GroupNorm(in_channels), GroupNorm(out_channels)
        self.conv0, self.conv1 = Conv2d(in_channels, out_channels, 3), Conv2d(out_channels, out_channels, 3)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        if num_heads:
            self.norm2 = GroupNorm(out_channels)
            self.qkv, self.proj = Conv2d(out_channels, 3 * out_channels, 1), Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = silu(self.norm1(h) * (scale + 1) + shift)
        else:
            h = silu(self.norm1(h.add_(params)))
        x = self.conv1(F.dropout(h, self.dropout, self.training)).add_(x if self.skip is None else self.skip(x)) * self.skip_scale
        return self.attend(x) if self.num_heads else x

    def attend(self, x: Tensor) -> Tensor:
        width = x.shape[1] // self.num_heads
        q, k, v = self.qkv(self.norm2(x)).reshape(x.shape[0] * self.num_heads, width, 3, -1).unbind(2)
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = torch.einsum("ncq,nck->nqk", q.to(wide), k.to(wide) / math.sqrt(width)).softmax(dim=2).to(x.dtype)
        attended = torch.einsum("nqk,nck->ncq", weights, v)
        return self.proj(attended.reshape(x.shape)).add_(x) * self.skip_scale


@persistent
class UNet(nn.Module):
    """F(x, c_noise, class_labels) of a few blocks of EDM at one resolution, the last of which takes what the first returned beside."""

    def __init__(self, img_channels: int, label_dim: int, channels: int, heads: Sequence[int], adaptive_scale: bool) -> None:
        super().__init__()
        self.channels = channels
        self.map_layer0 = Linear(channels, 2 * channels)
        self.map_label = Linear(label_dim, 2 * channels) if label_dim else None
        self.entry, self.exit = Conv2d(img_channels, channels, 3), Conv2d(channels, img_channels, 3)
        widths = [channels] * (len(heads) - 1) + [2 * channels]
        self.blocks = nn.ModuleList(UNetBlock(w, channels, 2 * channels, h, adaptive_scale) for w, h in zip(widths, heads, strict=True))

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        emb = self.map_layer0(waves(noise_labels.to(x.dtype), self.channels))
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels.to(x.dtype) * self.map_label.in_features**0.5)
        x = first = self.entry(x)
        for block in self.blocks:
            x = block(x if block.in_channels == x.shape[1] else torch.cat((x, first), 1), silu(emb))
        return self.exit(x)


def unit(x: Tensor, dim: int | tuple[int, ...], eps: float = 1e-4) -> Tensor:
    """x / (eps + rms(x)) over dim."""
    return x / (eps + x.square().mean(dim, keepdim=True).sqrt())


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_silu(x: Tensor) -> Tensor:
    return silu(x) / 0.596


@persistent
class MPConv(nn.Module):
    """A convolution, or a linear layer, with weights of unit variance, which training writes back, scaled to keep magnitudes."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        dims = tuple(range(1, self.weight.dim()))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit(self.weight, dims))
        weight = (unit(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return x @ weight.t() if weight.dim() == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


@persistent
class EDM2Block(nn.Module):
    """EDM2's residual block (arXiv 2312.02696, figure 21), of the encoder or the decoder, without resampling."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, num_heads: int, flavor: str = "enc") -> None:
        super().__init__()
        self.out_channels, self.flavor, self.num_heads, self.dropout = out_channels, flavor, num_heads, 0.0
        self.res_balance, self.attn_balance, self.clip_act = 0.3, 0.3, 2.0
        self.emb_gain = nn.Parameter(torch.tensor(0.5))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear, self.conv_res1 = MPConv(emb_channels, out_channels), MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.flavor == "enc":
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = self.conv_res1(mp_silu(self.conv_res0(mp_silu(x)) * c[:, :, None, None].to(x.dtype)))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads != 0:
            x = mp_sum(x, self.attend(x), self.attn_balance)
        return x if self.clip_act is None else x.clip_(-self.clip_act, self.clip_act)

    def attend(self, x: Tensor) -> Tensor:
        qkv = self.attn_qkv(x).reshape(x.shape[0], self.num_heads, -1, 3, x.shape[2] * x.shape[3])
        q, k, v = unit(qkv, 2).unbind(3)
        weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
        return self.attn_proj(torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape))


@persistent
class EDM2UNet(nn.Module):
    """F(x, c_noise, class_labels) of a few blocks of EDM2 at one resolution, the last of which takes what the first returned beside."""

    def __init__(self, img_channels: int, label_dim: int, channels: int, heads: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels
        self.emb_noise = MPConv(channels, channels)
        self.emb_label = MPConv(label_dim, channels) if label_dim else None
        self.entry, self.out_conv = MPConv(img_channels + 1, channels, (3, 3)), MPConv(channels, img_channels, (3, 3))
        self.out_gain = nn.Parameter(torch.tensor(0.7))
        self.enc = nn.ModuleList(EDM2Block(channels, channels, channels, h) for h in heads[:-1])
        self.dec = EDM2Block(2 * channels, channels, channels, heads[-1], "dec")

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None) -> Tensor:
        emb = self.emb_noise(waves(noise_labels.to(x.dtype), self.channels) * 2**0.5)
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(class_labels.to(x.dtype) * class_labels.shape[1] ** 0.5), 0.5)
        x = first = self.entry(torch.cat((x, torch.ones_like(x[:, :1])), 1))
        for block in self.enc:
            x = block(x, mp_silu(emb))
        return self.out_conv(self.dec(torch.cat((x, first), 1), mp_silu(emb)), gain=self.out_gain)


@persistent
class Precond(nn.Module):
    """net(x, sigma, class_labels) -> D, with EDM's preconditioning (Table 1). Without labels a conditional network gets zeros."""

    def __init__(self, network: nn.Module, inner: str, label_dim: int) -> None:
        super().__init__()
        self.label_dim, self.sigma_data, self.use_fp16 = label_dim, 0.5, False
        setattr(self, inner, network)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False, **more: Any) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1).to(x.dtype)
        if not self.label_dim:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros(1, self.label_dim, device=x.device)
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        v = sigma**2 + self.sigma_data**2
        raw = next(self.children())(x / v.sqrt(), sigma.flatten().log() / 4, class_labels, **more)
        return self.sigma_data**2 / v * x + sigma * self.sigma_data / v.sqrt() * raw


def edm(adaptive_scale: bool = True, label_dim: int = 10, channels: int = 8, heads: Sequence[int] = (0, 2, 1)) -> Precond:
    return Precond(UNet(2, label_dim, channels, heads, adaptive_scale), "model", label_dim)


def edm2(label_dim: int = 10, channels: int = 8, heads: Sequence[int] = (0, 2, 1)) -> Precond:
    return Precond(EDM2UNet(2, label_dim, channels, heads), "unet", label_dim)


class AdaRMSNorm(nn.Module):
    """x / rms(x) (1 + W cond), of pixels [B, H, W, C]."""

    def __init__(self, features: int, cond_features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.linear = eps, nn.Linear(cond_features, features, bias=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (self.linear(cond)[:, None, None] + 1) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return x * scale.to(x.dtype)


class AxialRoPE(nn.Module):
    """Angles [..., H, 2 pairs] of positions [..., 2], of every head its own."""

    def __init__(self, dim: int, n_heads: int) -> None:
        super().__init__()
        exponents = torch.linspace(math.log(math.pi), math.log(10 * math.pi), n_heads * dim // 4 + 1)[:-1]
        self.register_buffer("freqs", exponents.exp().view(dim // 4, n_heads).t().contiguous())

    def forward(self, pos: Tensor) -> Tensor:
        rows, columns = (pos[..., None, i : i + 1] * self.freqs.to(pos.dtype) for i in range(2))
        return torch.cat((rows, columns), -1)


class SelfAttentionBlock(nn.Module):
    """HDiT's self-attention with cosine similarity (arXiv 2401.11605, section 4.1) between all pixels."""

    def __init__(self, d_model: int, d_head: int, cond_features: int) -> None:
        super().__init__()
        self.d_head, self.n_heads = d_head, d_model // d_head
        self.norm = AdaRMSNorm(d_model, cond_features)
        self.qkv_proj, self.out_proj = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.scale = nn.Parameter(torch.full([self.n_heads], 10.0))
        self.pos_emb = AxialRoPE(d_head // 2, self.n_heads)
        self.dropout = nn.Dropout(0.0)

    def mask(self, x: Tensor) -> Tensor | None:
        return None

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.norm(x, cond)).flatten(1, 2).unflatten(2, (3, self.n_heads, self.d_head))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        theta = self.pos_emb(pos.flatten(0, 1).to(x.dtype)).transpose(0, 1)  # [H, N, D/4]
        q, k = (self.turned(y * self.inverse_length(y), theta) for y in (q, k))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x), scale=1.0)
        return self.out_proj(self.dropout(attended.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))) + x

    def inverse_length(self, y: Tensor) -> Tensor:
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        lengths = torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)
        return (self.scale.to(wide.dtype).sqrt()[:, None, None] * lengths).to(y.dtype)

    def turned(self, y: Tensor, theta: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        quarter = self.d_head // 4
        a, b, rest = y[..., :quarter].to(wide), y[..., quarter : 2 * quarter].to(wide), y[..., 2 * quarter :]
        cos, sin = theta.to(wide).cos(), theta.to(wide).sin()
        return torch.cat(((a * cos - b * sin).to(y.dtype), (b * cos + a * sin).to(y.dtype), rest), -1)


class NeighborhoodSelfAttentionBlock(SelfAttentionBlock):
    """The same between pixels that are near."""

    kernel_size = 3

    def mask(self, x: Tensor) -> Tensor:
        y, x = torch.meshgrid(*(torch.arange(n, device=x.device) for n in x.shape[1:3]), indexing="ij")
        apart = torch.maximum((y.flatten()[:, None] - y.flatten()).abs(), (x.flatten()[:, None] - x.flatten()).abs())
        return apart <= self.kernel_size // 2


class FeedForwardBlock(nn.Module):
    """x + W (a GELU(b)), with a and b of one projection."""

    def __init__(self, d_model: int, d_ff: int, cond_features: int) -> None:
        super().__init__()
        self.norm = AdaRMSNorm(d_model, cond_features)
        self.up_proj, self.down_proj = nn.Linear(d_model, 2 * d_ff, bias=False), nn.Linear(d_ff, d_model, bias=False)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        a, b = self.up_proj(self.norm(x, cond)).chunk(2, dim=-1)
        return self.down_proj(self.dropout(a * F.gelu(b))) + x


class TransformerLayer(nn.Module):
    def __init__(self, self_attn: nn.Module, ff: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.ff = self_attn, ff

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        return self.ff(self.self_attn(x, pos, cond), cond)


class HDiT(nn.Module):
    """model(x, sigma): layers of both kinds at one resolution, the first among neighbours."""

    def __init__(self, width: int = 32, d_head: int = 16, cond_features: int = 6, depth: int = 3, patch_size: int = 1) -> None:
        super().__init__()
        self.patch_in, self.patch_out = nn.Conv2d(3, width, patch_size, patch_size), nn.ConvTranspose2d(width, 3, patch_size, patch_size)
        self.mapping = nn.Linear(1, cond_features)
        kinds = [NeighborhoodSelfAttentionBlock] + [SelfAttentionBlock] * (depth - 1)
        self.layers = nn.ModuleList(
            TransformerLayer(kind(width, d_head, cond_features), FeedForwardBlock(width, 3 * width, cond_features)) for kind in kinds
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        cond = self.mapping(sigma[:, None].log().to(x.dtype) / 4)
        pixels = self.patch_in(x).movedim(1, -1)
        grid = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in pixels.shape[1:3]), indexing="ij")
        for layer in self.layers:
            pixels = layer(pixels, torch.stack(grid, -1), cond)
        return self.patch_out(pixels.movedim(-1, 1))
