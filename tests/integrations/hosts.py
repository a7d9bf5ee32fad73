"""Networks as users of DiT, EDM, EDM2 and HDiT have them, written from the papers; parts are named as those codebases name them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


class Attention(nn.Module):
    """Multi-head self-attention from one packed projection, as in timm."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """adaLN-Zero (Peebles and Xie, section 3.2)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(dim, num_heads, qk_norm)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class DiT(nn.Module):
    """model(x, t, y): patches of one pixel, noise and variance."""

    def __init__(
        self, channels: int = 4, dim: int = 36, depth: int = 2, num_heads: int = 2, classes: int = 10, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder, self.y_embedder = nn.Linear(channels, dim), nn.Linear(1, dim), nn.Embedding(classes + 1, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, 2, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(dim, 2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x.flatten(2).transpose(1, 2))
        c = self.t_embedder((t[:, None] / 1000).to(x.dtype)) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.final_layer(tokens, c).transpose(1, 2).unflatten(2, x.shape[2:])


class GroupNorm(nn.Module):
    """A group norm of one's own."""

    def __init__(self, channels: int, num_groups: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(nn.Module):
    """EDM's residual block (arXiv 2206.00364, appendix F.2): norm, SiLU, convolution; twice; attention; sums scaled by skip_scale."""

    def __init__(self, channels: int, emb_channels: int, num_heads: int, adaptive_scale: bool) -> None:
        super().__init__()
        self.num_heads, self.adaptive_scale, self.skip_scale = num_heads, adaptive_scale, 0.5**0.5
        self.norm0, self.norm1 = GroupNorm(channels), GroupNorm(channels)
        self.conv0, self.conv1 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.affine = nn.Linear(emb_channels, channels * (2 if adaptive_scale else 1))
        if num_heads:
            self.norm2 = GroupNorm(channels)
            self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = silu(self.norm1(h) * (scale + 1) + shift)
        else:
            h = silu(self.norm1(h + params))
        x = (self.conv1(h) + x) * self.skip_scale
        if self.num_heads:
            batch, channels = x.shape[:2]
            q, k, v = self.qkv(self.norm2(x)).reshape(batch * self.num_heads, channels // self.num_heads, 3, -1).unbind(2)
            weights = torch.einsum("ncq,nck->nqk", q / math.sqrt(k.shape[1]), k).softmax(dim=2)
            attended = torch.einsum("nqk,nck->ncq", weights, v)
            x = (self.proj(attended.reshape(x.shape)) + x) * self.skip_scale
        return x


def unit(x: Tensor, dim: int | tuple[int, ...], eps: float = 1e-4) -> Tensor:
    """x / (eps + rms(x)) over dim."""
    return x / (eps + x.square().mean(dim, keepdim=True).sqrt())


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_silu(x: Tensor) -> Tensor:
    return silu(x) / 0.596


class MPConv(nn.Module):
    """A convolution, or a linear layer, with weights of unit variance, scaled to keep magnitudes."""

    def __init__(self, channels: int, out: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, channels, *((kernel, kernel) if kernel else ())))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        dims = tuple(range(1, self.weight.dim()))
        weight = (unit(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return x @ weight.t() if weight.dim() == 2 else nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """EDM2's residual block (arXiv 2312.02696, figure 21, encoder), without resampling."""

    def __init__(self, channels: int, emb_channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.res_balance, self.attn_balance, self.clip_act = num_heads, 0.3, 0.3, 2.0
        self.emb_gain = nn.Parameter(torch.tensor(0.5))
        self.conv_res0, self.conv_res1 = MPConv(channels, channels, 3), MPConv(channels, channels, 3)
        self.emb_linear = MPConv(emb_channels, channels)
        self.conv_skip = None
        self.attn_qkv = MPConv(channels, 3 * channels, 1) if num_heads else None
        self.attn_proj = MPConv(channels, channels, 1) if num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = unit(x, 1)
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = self.conv_res1(mp_silu(self.conv_res0(mp_silu(x)) * c[:, :, None, None]))
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads != 0:
            y = self.attn_qkv(x)
            y = y.reshape(y.shape[0], self.num_heads, -1, 3, y.shape[2] * y.shape[3])
            q, k, v = unit(y, 2).unbind(3)
            weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(dim=3)
            attended = torch.einsum("nhqk,nhck->nhcq", weights, v)
            x = mp_sum(x, self.attn_proj(attended.reshape(x.shape)), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)


class Network(nn.Module):
    """F(x, c_noise, class_labels) of a few blocks, of either kind."""

    def __init__(self, blocks: list[nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.entry, self.exit = nn.Conv2d(2, channels, 1), nn.Conv2d(channels, 2, 1)
        self.noise, self.label = nn.Linear(1, 6), nn.Linear(classes, 6)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        emb = self.noise(noise[:, None].to(x.dtype))
        if class_labels is not None:
            emb = emb + self.label(class_labels.to(x.dtype))
        x = self.entry(x)
        for block in self.blocks:
            x = block(x, emb)
        return self.exit(x)


class Precond(nn.Module):
    """net(x, sigma, class_labels) -> D, with EDM's preconditioning (Table 1)."""

    def __init__(self, network: nn.Module, inner: str = "model", classes: int = 10, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.inner, self.label_dim, self.sigma_data = inner, classes, sigma_data
        setattr(self, inner, network)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1).to(x.dtype)
        v = sigma**2 + self.sigma_data**2
        raw = getattr(self, self.inner)(x / v.sqrt(), sigma.flatten().log() / 4, class_labels)
        return self.sigma_data**2 / v * x + sigma * self.sigma_data / v.sqrt() * raw


def edm(adaptive_scale: bool = True) -> Precond:
    return Precond(Network([UNetBlock(8, 6, heads, adaptive_scale) for heads in (0, 2, 1)], 8, 10))


def edm2() -> Precond:
    return Precond(Network([Block(8, 6, heads) for heads in (0, 2)], 8, 10), inner="unet")


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

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        exponents = torch.linspace(math.log(math.pi), math.log(10 * math.pi), heads * dim // 4 + 1)[:-1]
        self.register_buffer("freqs", exponents.exp().view(dim // 4, heads).t().contiguous())

    def forward(self, pos: Tensor) -> Tensor:
        rows, columns = (pos[..., None, i : i + 1] * self.freqs.to(pos.dtype) for i in range(2))
        return torch.cat((rows, columns), -1)


class GlobalBlock(nn.Module):
    """HDiT's self-attention with cosine similarity (arXiv 2401.11605, section 4.1) between all pixels."""

    def __init__(self, width: int, d_head: int, cond_features: int) -> None:
        super().__init__()
        self.d_head, self.n_heads = d_head, width // d_head
        self.norm = AdaRMSNorm(width, cond_features)
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.full([self.n_heads], 10.0))
        self.pos_emb = AxialRoPE(d_head // 2, self.n_heads)
        self.dropout = nn.Dropout(0.0)

    def mask(self, rows: int, columns: int) -> Tensor | None:
        return None

    def forward(self, x: Tensor, pos: Tensor, cond: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.norm(x, cond)).flatten(1, 2).unflatten(2, (3, self.n_heads, self.d_head))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, D]
        theta = self.pos_emb(pos.flatten(0, 1).to(x.dtype)).transpose(0, 1)  # [H, N, D/4]
        q, k = (self.turned(y * self.inverse_length(y), theta) for y in (q, k))
        attended = scaled_dot_product_attention(q, k, v, attn_mask=self.mask(*x.shape[1:3]), scale=1.0)
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


class NeighbourhoodBlock(GlobalBlock):
    """The same between pixels that are near."""

    kernel_size = 3

    def mask(self, rows: int, columns: int) -> Tensor:
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        apart = torch.maximum((y.flatten()[:, None] - y.flatten()).abs(), (x.flatten()[:, None] - x.flatten()).abs())
        return apart <= self.kernel_size // 2


class HDiT(nn.Module):
    """Blocks of both kinds at one resolution: model(x, sigma)."""

    def __init__(self, width: int = 32, d_head: int = 16, cond_features: int = 6) -> None:
        super().__init__()
        self.entry, self.exit, self.mapping = nn.Linear(3, width), nn.Linear(width, 3), nn.Linear(1, cond_features)
        self.blocks = nn.ModuleList(kind(width, d_head, cond_features) for kind in (NeighbourhoodBlock, GlobalBlock, GlobalBlock))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        cond = self.mapping(sigma[:, None].log().to(x.dtype) / 4)
        grid = torch.meshgrid(*(torch.linspace(-1, 1, size, dtype=x.dtype) for size in x.shape[2:]), indexing="ij")
        pixels = self.entry(x.movedim(1, -1))
        for block in self.blocks:
            pixels = block(pixels, torch.stack(grid, -1), cond)
        return self.exit(pixels).movedim(-1, 1)
