"""The transformer block of DiT."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ..._checks import check_count
from .._checks import check_dtypes, sequence, vectors
from .._policy import apply, check_policy
from ..embedding import zero_init
from ._parts import attend_to_itself, beside, check_heads, check_qk_norm, check_rope, feed_forward, qk_weight


class Carry(NamedTuple):
    """A residual sum not yet taken, hidden + gate * branch, so that whoever normalises it next does both in one pass."""

    hidden: Tensor
    branch: Tensor
    gate: Tensor


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (Peebles and Xie, arXiv 2212.09748).

    With (shift, scale, gate) x 2 = Linear(silu(condition)):
    x <- x + gate * attention(LN(x) (1 + scale) + shift), then the same with an MLP. Starts as the identity.

    Args:
        dim: channels C.
        num_heads: heads, dividing C; D = C / num_heads.
        condition_dim: width E of the conditioning vector.
        mlp_ratio: hidden width of the MLP over C.
        qk_norm: "rms", "layer" (per head, learned weight) or None.
        policy: "auto", "always" or "never": whether the ops are called under torch.compile; see docs/blocks.md.

    State dict:
        modulation.weight [6C, E], .bias [6C]: shift, scale, gate of the attention, then of the MLP.
        qkv.weight [3C, C], .bias [3C]: rows ordered (q, k, v), head, channel.
        q_weight, k_weight [D]: with qk_norm alone.
        attention_out.weight [C, C], .bias [C].
        mlp.0.weight [hidden, C], .bias [hidden]; mlp.2.weight [C, hidden], .bias [C].

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
        policy: str = "auto",
    ) -> None:
        super().__init__()
        head_dim = check_heads(num_heads, dim)
        self.num_heads, self.qk_norm = num_heads, check_qk_norm(qk_norm, ("rms", "layer"))
        self.policy = check_policy(policy)
        self.modulation = zero_init(nn.Linear(check_count(condition_dim, "condition_dim"), 6 * dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_weight, self.k_weight = qk_weight(qk_norm, num_heads, head_dim), qk_weight(qk_norm, num_heads, head_dim)
        self.attention_out = nn.Linear(dim, dim)
        self.mlp = feed_forward(dim, mlp_ratio)

    def forward(
        self, x: Tensor | Carry, condition: Tensor, rope: tuple[Tensor, Tensor] | None = None, *, carry: bool = False
    ) -> Tensor | Carry:
        """One block.

        Args:
            x: [B, N, C], or what the block before returned with carry=True.
            condition: [B, condition_dim].
            rope: (cos, sin), each [N, D/2], turning neighbouring channels of q and k; or None.
            carry: return the last sum undone, for the next block's first normalisation to take.

        Returns:
            [B, N, C] of x's dtype; with carry=True a `Carry` standing for it.
        """
        hidden = x.hidden if isinstance(x, Carry) else x
        sequence("x", hidden, self.qkv.in_features)
        vectors("condition", condition, hidden.shape[0], self.modulation.in_features)
        check_dtypes(self.qkv, x=hidden, condition=condition)
        check_rope(rope)
        modulation = beside(self.modulation(F.silu(condition)), hidden)  # [B, 6C]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)  # [B, C] each
        if isinstance(x, Carry):
            hidden, h = apply(self.policy, "gate_residual_norm_modulate", *x, shift_a, scale_a)
        else:
            h = apply(self.policy, "layer_norm_modulate", x, shift_a, scale_a)
        attended = self._attend(h, rope).to(hidden.dtype)
        hidden, h = apply(self.policy, "gate_residual_norm_modulate", hidden, attended, gate_a, shift_m, scale_m)
        branch = self.mlp(h).to(hidden.dtype)
        return Carry(hidden, branch, gate_m) if carry else apply(self.policy, "gate_residual", hidden, branch, gate_m)

    def _attend(self, h: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        packed = self.qkv(h)  # [B, N, 3C]
        attended = attend_to_itself(self.policy, packed, self.num_heads, self.qk_norm, self.q_weight, self.k_weight, rope)
        return self.attention_out(attended)
