"""The attention block of EDM2, which preserves the magnitude of what passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import check_number, check_positive
from .._checks import check_dtypes, feature_map
from .._policy import apply, check_policy
from ._parts import check_heads, pixels


class MagnitudePreservingLinear(nn.Module):
    """y = w x with each row of w scaled to length 1, so that inputs of unit variance give outputs of unit variance.

    w_i / (|w_i| + eps sqrt(in_features)) (Karras et al., arXiv 2312.02696, eq. 47 and 66); no bias.

    State dict:
        weight [out_features, in_features]: starts standard normal.
    """

    def __init__(self, in_features: int, out_features: int, *, eps: float = 1e-4) -> None:
        super().__init__()
        self.in_features, self.eps = in_features, eps
        self.weight = nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """gain w x for x [..., in_features]."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        norm = torch.linalg.vector_norm(self.weight, dim=1, keepdim=True, dtype=wide)  # [out_features, 1]
        return F.linear(x, (self.weight * (gain / (norm + self.eps * math.sqrt(self.in_features)))).to(self.weight.dtype))

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale the stored rows to length sqrt(in_features), which changes no output: forced weight normalisation.

        Call it after each step of the optimizer: gradients are orthogonal to the rows, which otherwise only grow and slow learning down.
        """
        norm = torch.linalg.vector_norm(self.weight, dim=1, keepdim=True) / math.sqrt(self.in_features)
        self.weight.div_(norm + self.eps)


class EDM2AttentionBlock(nn.Module):
    """Magnitude-preserving self-attention over the pixels of a feature map (Karras et al., arXiv 2312.02696, section 2, appendix B).

    clip(((1 - t) x + t W attention(pixel_norm(q), pixel_norm(k), pixel_norm(v))) / sqrt((1 - t)^2 + t^2)) with (q, k, v) = W_qkv x,
    pixel_norm(a) = a / (sqrt(mean(a^2)) + eps) over the channels of a head, t = balance, and rows of W and W_qkv of length 1.

    Args:
        channels: channels C.
        num_heads: heads, dividing C; D = C / num_heads (64 in the paper).
        balance: t, in [0, 1].
        clip: largest magnitude of the result; None for no limit.
        eps: of the normalisation of pixels and of weights.
        policy: "auto", "always" or "never": whether the ops are called under torch.compile; see docs/blocks.md.

    State dict:
        qkv.weight [3C, C]: rows ordered (q, k, v), head, channel. out.weight [C, C]. No biases. Both start standard normal.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        balance: float = 0.3,
        clip: float | None = 256.0,
        eps: float = 1e-4,
        policy: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(num_heads, channels, "channels")
        self.num_heads, self.balance = num_heads, check_number(balance, "balance", minimum=0, maximum=1)
        self.clip = None if clip is None else check_positive(clip, "clip")
        self.eps, self.policy = check_positive(eps, "eps"), check_policy(policy)
        self.qkv = MagnitudePreservingLinear(channels, 3 * channels, eps=eps)
        self.out = MagnitudePreservingLinear(channels, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W], contiguous or channels_last -> [B, C, H, W] of x's dtype and layout."""
        feature_map(x, self.qkv.in_features)
        check_dtypes(self.qkv, x=x)
        packed = self.qkv(pixels(x)).unflatten(2, (3 * self.num_heads, -1))  # [B, N, 3 heads, D]
        packed = apply(self.policy, "pixel_norm", packed, eps=self.eps).unflatten(2, (3, self.num_heads))  # [B, N, 3, heads, D]
        attended = apply(self.policy, "attention_packed", packed).flatten(2)  # [B, N, C]
        norm = math.hypot(1 - self.balance, self.balance)
        # The weight takes the branch's share of the sum, which spares a pass over the branch.
        branch = self.out(attended, gain=self.balance / norm).transpose(1, 2).reshape(x.shape).to(x.dtype)
        y = x * ((1 - self.balance) / norm) + branch
        return y if self.clip is None else y.clamp(-self.clip, self.clip)
