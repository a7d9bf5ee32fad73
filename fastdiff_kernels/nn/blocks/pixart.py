"""The transformer block of PixArt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._checks import check_count
from .._checks import check_dtypes, sequence
from .._policy import apply, check_policy
from ..embedding import zero_init
from ._parts import HEAD_NORMS, attend_to_itself, beside, check_heads, check_qk_norm, feed_forward, qk_weight, split_heads


class PixArtBlock(nn.Module):
    """Transformer block with adaLN-single conditioning and cross-attention to text (Chen et al., arXiv 2310.00426).

    With (shift, scale, gate) x 2 = scale_shift_table + time:
    x <- x + gate * attention(LN(x) (1 + scale) + shift); x <- x + cross_attention(x, context);
    x <- x + gate * MLP(LN(x) (1 + scale) + shift). One time embedding serves all blocks; the table [6, C] is each block's own.

    Args:
        dim: channels C.
        num_heads: heads, dividing C; D = C / num_heads.
        context_dim: channels of the text tokens; C unless given.
        mlp_ratio: hidden width of the MLP over C.
        qk_norm: of the self-attention: "rms", "layer" (per head), "rms_heads", "layer_heads" (over C) or None.
        policy: "auto", "always" or "never": whether the ops are called under torch.compile; see docs/blocks.md.

    State dict:
        scale_shift_table [6, C]: shift, scale, gate of the attention, then of the MLP. Starts normal, of variance 1 / C.
        qkv.weight [3C, C], .bias [3C]: rows ordered (q, k, v), head, channel.
        q_weight, k_weight [D], or [C] for norms over all heads: with qk_norm alone.
        attention_out.weight [C, C], .bias [C].
        cross_q.weight [C, C], .bias [C]; cross_kv.weight [2C, context_dim], .bias [2C]: rows ordered (k, v), head, channel.
        cross_out.weight [C, C], .bias [C]: start at zero.
        mlp.0.weight [hidden, C], .bias [hidden]; mlp.2.weight [C, hidden], .bias [C].

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qk_norm: str | None = None,
        policy: str = "auto",
    ) -> None:
        super().__init__()
        head_dim = check_heads(num_heads, dim)
        self.num_heads, self.qk_norm = num_heads, check_qk_norm(qk_norm, HEAD_NORMS)
        self.policy = check_policy(policy)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_weight, self.k_weight = qk_weight(qk_norm, num_heads, head_dim), qk_weight(qk_norm, num_heads, head_dim)
        self.attention_out = nn.Linear(dim, dim)
        self.cross_q = nn.Linear(dim, dim)
        self.cross_kv = nn.Linear(dim if context_dim is None else check_count(context_dim, "context_dim"), 2 * dim)
        self.cross_out = zero_init(nn.Linear(dim, dim))
        self.mlp = feed_forward(dim, mlp_ratio)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, key_lengths: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            x: [B, N, C].
            time: [B, 6, C] or [B, 6C], the embedding of the noise level that all blocks share.
            context: [B, M, context_dim], text tokens.
            key_lengths: int32 or int64 [B]: sample b has key_lengths[b] tokens of text, and padding behind them; None: all M.

        Returns:
            [B, N, C] of x's dtype.
        """
        sequence("x", x, self.qkv.in_features)
        sequence("context", context, self.cross_kv.in_features, x.shape[0])
        check_dtypes(self.qkv, x=x, context=context)
        batch, _, dim = x.shape
        if time.shape not in ((batch, 6, dim), (batch, 6 * dim)):
            raise ValueError(f"time must have shape [{batch}, 6, {dim}] or [{batch}, {6 * dim}], got {tuple(time.shape)}")
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = beside(time.reshape(batch, 6, dim), x).unbind(1)  # [B, C] each
        table = beside(self.scale_shift_table, x)  # [6, C]
        h = apply(self.policy, "layer_norm_modulate", x, shift_a, scale_a, table=table[:2])
        x = apply(self.policy, "gate_residual", x, self._attend(h).to(x.dtype), gate_a, table=table[2:3])
        branch = self._attend_context(x, context, key_lengths).to(x.dtype)
        x, h = apply(self.policy, "gate_residual_norm_modulate", x, branch, None, shift_m, scale_m, table=table[3:5])
        return apply(self.policy, "gate_residual", x, self.mlp(h).to(x.dtype), gate_m, table=table[5:])

    def _attend(self, h: Tensor) -> Tensor:
        packed = self.qkv(h)  # [B, N, 3C]
        return self.attention_out(attend_to_itself(self.policy, packed, self.num_heads, self.qk_norm, self.q_weight, self.k_weight))

    def _attend_context(self, x: Tensor, context: Tensor, key_lengths: Tensor | None) -> Tensor:
        (q,) = split_heads(self.cross_q(x), 1, self.num_heads)  # [B, N, heads, D]
        k, v = split_heads(self.cross_kv(context), 2, self.num_heads)  # [B, M, heads, D] each
        return self.cross_out(apply(self.policy, "attention", q, k, v, key_lengths=key_lengths).flatten(2))
