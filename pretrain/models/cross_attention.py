"""A decoder layer's attention to all of the encoder's output (Vaswani et al. 2017, 1706.03762).

Shapes: B batch, T decoder tokens, S encoder tokens, D model width, H heads, K head width.

There is no bias by distance and no rotation, as in T5: the two sequences share no clock.
"""

from typing import NamedTuple

from torch import Tensor, nn

from pretrain.mixers.attention import check_heads, check_scaling, qk_scale
from pretrain.ops.masked_attention import masked_attention
from pretrain.ops.normalization import prepare_heads


class KeysValues(NamedTuple):
    """k, v: (B, S, H, K), what a layer reads of the encoder; made once, read at every token."""

    k: Tensor
    v: Tensor


class CrossAttention(nn.Module):
    """Softmax attention of decoder tokens to encoder tokens.

    Args:
        d_model: model width.
        n_heads: attention heads.
        head_dim: K; 0: d_model / n_heads.
        qk_norm: L2-normalise queries and keys, with a learned scale per head.
        scale_scores: divide the scores by sqrt(K).

    Raises:
        ValueError: heads of no or of odd width, or scores that are to be scaled and not.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 8,
        head_dim: int = 0,
        qk_norm: bool = False,
        scale_scores: bool = True,
    ) -> None:
        super().__init__()
        check_scaling("cross_attention", qk_norm, scale_scores)
        self.n_heads = n_heads
        self.head_dim = check_heads("cross_attention", d_model, n_heads, head_dim)
        self.width = n_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, self.width, bias=False)
        self.kv_proj = nn.Linear(d_model, 2 * self.width, bias=False)
        self.qk_scale = qk_scale(n_heads, self.head_dim) if qk_norm else None
        self.scale = None if scale_scores and not qk_norm else 1.0
        self.out_proj = nn.Linear(self.width, d_model, bias=False)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """memory (B, S, D), the encoder's output."""
        k, v = self.kv_proj(memory).unflatten(-1, (2, self.n_heads, self.head_dim)).unbind(2)
        return KeysValues(prepare_heads(k, normalize=self.qk_scale is not None), v)

    def forward(
        self, x: Tensor, memory: Tensor | KeysValues, padding: Tensor | None = None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        Args:
            x: decoder tokens, normed by the block.
            memory: the encoder's output (B, S, D), or what `keys_values` made of it.
            padding: (B, S) bool, True where the encoder has no token.
        """
        k, v = self.keys_values(memory) if isinstance(memory, Tensor) else memory
        q = self.q_proj(x).unflatten(-1, (self.n_heads, self.head_dim))
        q = prepare_heads(q, normalize=self.qk_scale is not None, scale=self.qk_scale)
        q, k, v = (part.transpose(1, 2) for part in (q, k.to(q.dtype), v.to(q.dtype)))
        visible = None if padding is None else ~padding[:, None, None]
        y = masked_attention(q, k, v, visible, self.scale, causal=False)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def flops(self, seq_len: int, target_len: int) -> float:
        """Forward FLOPs of one row: projections of both sides, and all of its scores."""
        d_model = self.q_proj.in_features
        projections = 4 * d_model * self.width * (target_len + seq_len)
        return projections + 4 * self.width * seq_len * target_len
