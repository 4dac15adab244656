"""Fourier sparse attention: each token predicts the few places it attends to (Zhuang et al. 2022,
ACL, 2022.acl-long.19). A reconstruction: of the paper, its abstract was at hand.

    c = cross pooling of x W_a and x W_b    all pairs of hidden states, pooled by FFT
    p = x + gelu(c) W_c                     what places are predicted from
    m = (n - 1) sigmoid(p W_m + bias)       J continuous places per token and head
    y = softmax(q . k_j / sqrt(K) - (j - m)^2 / (2 w^2)) v_j,   j in {floor m, floor m + 1}

Shapes: B batch, T time, D model width, H heads, K head width, E pooled channels, J places per token
and head, n tokens of a sequence (T less its padding).

An index has no gradient, but the distance j - m that stands in the score has one. It is truncated:
it comes from the two cells around m and says nothing of what stands further away.

The paper's (abstract): a hidden-state cross module that pools all pairwise combinations in
O(L log L), a module that estimates from it which entries of the attention matrix dominate, indices
learned by reparameterisation and gradient truncation. Ours: every equation above. Pairs are pooled
by their middle, divided by the root of their number. Half of the places start spread over the
sequence, the other half follow the token (the bias grows with the logit of its own place). Places
that coincide count twice. Rotary positions.

An encoder mixer: pooling and places see the whole sequence, so a causal form does not exist.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.mixers.attention import check_heads
from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.ops.cross_pooling import cross_pooling
from pretrain.ops.indexed_attention import indexed_attention
from pretrain.ops.numerics import no_autocast, wide_dtype
from pretrain.ops.qkv_heads import prepare_qkv


class Places(nn.Module):
    """Predicts J places per token and head, in tokens from the start of the sequence."""

    def __init__(self, d_model: int, n_heads: int, places: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.proj = nn.Linear(d_model, n_heads * places, bias=False)
        spread = (torch.arange(places) + 0.5) / places
        follows = torch.arange(places) % 2
        bias = torch.where(follows == 1, 0.2 * (spread - 0.5), torch.logit(spread))
        self.bias = nn.Parameter(bias.repeat(n_heads, 1))
        self.follow = nn.Parameter(follows.float().repeat(n_heads, 1))

    def forward(self, p: Tensor, index: Tensor, count: Tensor) -> Tensor:
        """p (B, T, D), index (B, T) of each token, count (B, 1) of tokens -> (B, T, H, J)."""
        predicted = self.proj(p).unflatten(-1, (self.n_heads, -1))
        with no_autocast(p):
            wide = wide_dtype(predicted, self.bias)
            own = torch.logit((index.to(wide) + 0.5) / count)[..., None, None]
            logits = predicted.to(wide) + self.bias.to(wide) + self.follow.to(wide) * own
            return (count - 1)[..., None, None] * logits.sigmoid()


class FourierSparseAttention(TokenMixer):
    """Attention to predicted places.

    Args:
        d_model: model width.
        causal: must be False.
        n_heads: attention heads.
        n_places: J; each costs two keys.
        d_pool: E, channels of the pooled products; 0: a quarter of the model width.
        rotary_base: base of the rotary wavelengths.
    """

    two_sided = True
    encoder_only = True

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        n_heads: int = 8,
        n_places: int = 16,
        d_pool: int = 0,
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if causal:
            raise ValueError(
                "fsat.causal=True: its pooling and its predicted places see the whole sequence, "
                "so it has no causal form and serves encoders only"
            )
        if n_places < 2:
            raise ValueError(
                f"fsat.n_places={n_places} must be at least 2: one that follows the token and one "
                f"that does not"
            )
        if d_pool < 0:
            raise ValueError(f"fsat.d_pool={d_pool} must not be negative; 0: d_model / 4")
        self.causal = False
        self.d_model, self.n_heads, self.n_places = d_model, n_heads, n_places
        self.head_dim = check_heads("fsat", d_model, n_heads)
        self.d_pool = d_pool or max(1, d_model // 4)
        self.rotary_base = rotary_base
        self.pool_proj = nn.Linear(d_model, 2 * self.d_pool, bias=False)  # W_a and W_b
        self.cross_proj = nn.Linear(2 * self.d_pool, d_model, bias=False)
        self.places = Places(d_model, n_heads, n_places)
        # Starts at one token: the nearer cell counts most, the other one enough to be compared.
        self.log_width = nn.Parameter(torch.zeros(n_heads, n_places))
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        resets: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> MixerOutput:
        """x (B, T, D); padding may stand before and behind a lane's tokens, not among them."""
        self.check_sides(state, resets, padding)
        index = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        first, count = index[:, :1], torch.full_like(index[:, :1], x.shape[1])
        if padding is not None:
            x = x.masked_fill(padding.unsqueeze(-1), 0)
            first = padding.to(torch.uint8).argmin(1, keepdim=True)
            count = (~padding).sum(1, keepdim=True).clamp(min=1)
        index = (index - first).clamp(min=0).minimum(count - 1)

        pooled = self._pool(x, index, count)
        places = self.places(x + self.cross_proj(F.gelu(pooled)), index, count)
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        heads = prepare_qkv(qkv, base=self.rotary_base)
        y = indexed_attention(heads.q, heads.k, heads.v, places, self.log_width, first, count)
        return MixerOutput(self.out_proj(y.flatten(2)), None, aux={})

    def _pool(self, x: Tensor, index: Tensor, count: Tensor) -> Tensor:
        """(B, T, 2 E): unrelated states give the same variance wherever a pair's middle lies."""
        a, b = self.pool_proj(x).chunk(2, -1)
        sums = cross_pooling(a, b)
        middles = 2 * index.unsqueeze(-1) + torch.arange(2, device=x.device)  # t + s, (B, T, 2)
        pairs = middles.minimum(2 * count.unsqueeze(-1) - 2 - middles) + 1
        scale = pairs.clamp(min=1).to(sums.dtype).rsqrt()
        pooled = sums.unflatten(-1, (2, self.d_pool)) * scale.unsqueeze(-1)
        return pooled.flatten(-2).to(a.dtype)

    def flops_per_token(self, context: int) -> float:
        # Matmuls: the three FFTs over E channels are not among them.
        projections = 8 * self.d_model**2 + 8 * self.d_model * self.d_pool
        projections += 2 * self.d_model * self.n_heads * self.n_places
        return projections + 4 * self.d_model * 2 * self.n_places

    def executed_flops(self, length: int) -> float:
        return length * self.flops_per_token(length)

    def no_decay_parameters(self) -> set[str]:
        return {"log_width", "places.bias", "places.follow"}
