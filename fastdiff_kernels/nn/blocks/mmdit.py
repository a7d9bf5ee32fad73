"""The transformer block of Stable Diffusion 3."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import check_count
from .._checks import check_dtypes, sequence, vectors
from .._policy import apply, check_policy
from ..embedding import zero_init
from ._parts import beside, check_heads, check_qk_norm, feed_forward, normalise_and_rotate, qk_weight, split_heads


class MMDiTBlock(nn.Module):
    """Two streams, image and text, with weights of their own and one attention over both (Esser et al., arXiv 2403.03206).

    Each stream is a `DiTBlock`, but that queries of both attend to keys of both. Starts as the identity.

    Args:
        dim: channels C of both streams.
        num_heads: heads, dividing C; D = C / num_heads.
        condition_dim: width E of the conditioning vector.
        mlp_ratio: hidden width of the MLPs over C.
        qk_norm: "rms" (per head, learned weights; SD3.5) or None (SD3).
        context_pre_only: the text gives keys and values and ends there: the last block of a network.
        policy: "auto", "always" or "never": whether the ops are called under torch.compile; see docs/blocks.md.

    State dict:
        modulation.weight [6C, E], .bias [6C]: shift, scale, gate of the attention, then of the MLP.
        qkv.weight [3C, C], .bias [3C]: rows ordered (q, k, v), head, channel.
        q_weight, k_weight [D]: with qk_norm alone.
        attention_out.weight [C, C], .bias [C].
        mlp.0.weight [hidden, C], .bias [hidden]; mlp.2.weight [C, hidden], .bias [C].
        All of these again for the text, prefixed context_. With context_pre_only context_modulation has 2C rows, shift and scale, and
        context_attention_out and context_mlp do not exist.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        condition_dim: int,
        *,
        mlp_ratio: float = 4.0,
        qk_norm: str | None = None,
        context_pre_only: bool = False,
        policy: str = "auto",
    ) -> None:
        super().__init__()
        head_dim = check_heads(num_heads, dim)
        self.num_heads, self.qk_norm = num_heads, check_qk_norm(qk_norm, ("rms",))
        if not isinstance(context_pre_only, bool):
            raise TypeError(f"context_pre_only must be a bool, got {type(context_pre_only).__name__}")
        self.context_pre_only, self.policy = context_pre_only, check_policy(policy)
        self.modulation = zero_init(nn.Linear(check_count(condition_dim, "condition_dim"), 6 * dim))
        self.context_modulation = zero_init(nn.Linear(condition_dim, (2 if context_pre_only else 6) * dim))
        self.qkv, self.context_qkv = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.q_weight, self.k_weight = qk_weight(qk_norm, num_heads, head_dim), qk_weight(qk_norm, num_heads, head_dim)
        self.context_q_weight, self.context_k_weight = qk_weight(qk_norm, num_heads, head_dim), qk_weight(qk_norm, num_heads, head_dim)
        self.attention_out = nn.Linear(dim, dim)
        self.context_attention_out = None if context_pre_only else nn.Linear(dim, dim)
        self.mlp = feed_forward(dim, mlp_ratio)
        self.context_mlp = None if context_pre_only else feed_forward(dim, mlp_ratio)

    def forward(self, x: Tensor, context: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            x: [B, N, C], the image.
            context: [B, M, C], the text, x's dtype.
            condition: [B, condition_dim].

        Returns:
            (x, context), shapes and dtype as they came; context is None with context_pre_only.
        """
        sequence("x", x, self.qkv.in_features)
        sequence("context", context, self.qkv.in_features, x.shape[0])
        vectors("condition", condition, x.shape[0], self.modulation.in_features)
        check_dtypes(self.qkv, x=x, context=context, condition=condition)
        condition = F.silu(condition)
        mods = beside(self.modulation(condition), x).chunk(6, dim=1)  # [B, C] each
        context_mods = beside(self.context_modulation(condition), context).chunk(2 if self.context_pre_only else 6, dim=1)
        image = self._project(x, mods, self.qkv, self.q_weight, self.k_weight)
        text = self._project(context, context_mods, self.context_qkv, self.context_q_weight, self.context_k_weight)
        # Where the text ends here, nobody reads what its queries find.
        q = image[0] if self.context_pre_only else torch.cat([image[0], text[0]], dim=1)  # [B, N (+ M), heads, D]
        k, v = (torch.cat(pair, dim=1) for pair in zip(image[1:], text[1:], strict=True))  # [B, N + M, heads, D] each
        attended = apply(self.policy, "attention", q, k, v).flatten(2)  # [B, N (+ M), C]
        tokens = x.shape[1]
        x = self._finish(x, self.attention_out(attended[:, :tokens]), mods, self.mlp)
        if self.context_attention_out is None or self.context_mlp is None:
            return x, None
        return x, self._finish(context, self.context_attention_out(attended[:, tokens:]), context_mods, self.context_mlp)

    def _project(
        self, x: Tensor, mods: tuple[Tensor, ...], qkv: nn.Linear, q_weight: Tensor | None, k_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = apply(self.policy, "layer_norm_modulate", x, mods[0], mods[1])
        q, k, v = split_heads(qkv(h), 3, self.num_heads)  # [B, N, heads, D] each
        return *normalise_and_rotate(self.policy, self.qk_norm, q, k, q_weight, k_weight), v

    def _finish(self, x: Tensor, attended: Tensor, mods: tuple[Tensor, ...], mlp: nn.Module) -> Tensor:
        _, _, gate_a, shift_m, scale_m, gate_m = mods
        x, h = apply(self.policy, "gate_residual_norm_modulate", x, attended.to(x.dtype), gate_a, shift_m, scale_m)
        return apply(self.policy, "gate_residual", x, mlp(h).to(x.dtype), gate_m)
