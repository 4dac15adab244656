"""Full attention (Vaswani et al. 2017, 1706.03762) with rotary positions (Su et al. 2021,
2104.09864) or T5's bias (Raffel et al. 2020, 1910.10683): the baseline of every table.

Shapes: B batch, T time, S cached tokens, D model width, H heads, K head width.

Its state is a cache of *all* keys and values since the stream began, so it is the one mixer here
whose state is not of constant size; a reset hides the old entries without freeing them.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.mixers.base import Clock, MixerOutput, TokenMixer
from pretrain.ops.masked_attention import masked_attention
from pretrain.ops.qkv_heads import prepare_qkv
from pretrain.ops.relative_bias import SharedT5Bias, toeplitz_bias

# Rows of the score matrix that are alive at once where a mask is needed.
QUERY_BLOCK = 512


def qk_scale(n_heads: int, head_dim: int) -> nn.Parameter:
    """The learned scale per head, (H,), that L2-normalised queries and keys need."""
    return nn.Parameter(torch.full((n_heads,), math.sqrt(head_dim)))


def check_heads(mixer: str, d_model: int, n_heads: int, head_dim: int = 0) -> int:
    """The head width: `head_dim`, or where that is 0 the model width over the heads.

    Raises:
        ValueError: the heads do not divide the model width, or are of odd width.
    """
    if head_dim:
        if n_heads < 1 or head_dim < 0 or head_dim % 2:
            raise ValueError(
                f"{mixer}.n_heads={n_heads}, head_dim={head_dim}: there must be a head, and of "
                f"even width (rotary positions turn pairs); head_dim=0 shares d_model out"
            )
        return head_dim
    if n_heads < 1 or d_model % n_heads or d_model // n_heads % 2:
        raise ValueError(
            f"{mixer}.n_heads={n_heads} does not divide d_model={d_model} into heads of even width "
            f"(rotary positions turn pairs): choose another n_heads"
        )
    return d_model // n_heads


def check_scaling(mixer: str, qk_norm: bool, scale_scores: bool) -> None:
    """Raises ValueError when scores are to be left as they are, and scaled by a learned number."""
    if qk_norm and not scale_scores:
        raise ValueError(
            f"{mixer}.scale_scores=false with qk_norm=true: normalised queries and keys have a "
            f"learned scale; leave one of them out"
        )


def position_bias(
    mixer: str, position: str, n_heads: int, *, causal: bool = True
) -> SharedT5Bias | None:
    """The table of T5's relative positions; None for rotary ones.

    Raises:
        ValueError: no such kind of positions.
    """
    if position not in ("rotary", "t5"):
        raise ValueError(f"{mixer}.position={position!r} is unknown: choose rotary or t5")
    return SharedT5Bias(n_heads, causal=causal) if position == "t5" else None


class AttentionState(NamedTuple):
    """k, v: (B, S, H, K), every token so far; keys are normalised and rotated already."""

    position: Tensor
    phase: Tensor
    k: Tensor
    v: Tensor


class Attention(TokenMixer):
    """Softmax attention over the whole context, or over the whole sequence.

    Args:
        d_model: model width.
        causal: False for encoders: every token sees all others.
        n_heads: attention heads.
        head_dim: K; 0: d_model / n_heads.
        qk_norm: L2-normalise queries and keys, with a learned scale per head.
        scale_scores: divide the scores by sqrt(K); T5 has that in its first weights instead.
        position: "rotary", or "t5" for T5's bias by bucket of distance; it costs a matrix of scores
            (T, S) that the fused kernels otherwise do without.
        rotary_base: base of the rotary wavelengths.
    """

    constant_state = False
    two_sided = True

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        n_heads: int = 8,
        head_dim: int = 0,
        qk_norm: bool = False,
        scale_scores: bool = True,
        position: Literal["rotary", "t5"] = "rotary",
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        check_scaling("attention", qk_norm, scale_scores)
        self.d_model, self.n_heads = d_model, n_heads
        self.causal = causal
        self.head_dim = check_heads("attention", d_model, n_heads, head_dim)
        self.width = n_heads * self.head_dim
        self.rotary_base = rotary_base
        self.position_bias = position_bias("attention", position, n_heads, causal=causal)
        self.qkv_proj = nn.Linear(d_model, 3 * self.width, bias=False)
        self.qk_scale = qk_scale(n_heads, self.head_dim) if qk_norm else None
        self.scale = None if scale_scores and not qk_norm else 1.0
        self.out_proj = nn.Linear(self.width, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        *,
        resets: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> MixerOutput:
        self.check_sides(state, resets, padding)
        clock = self.clock(x, state, resets)
        cached = 0 if state is None else state.k.shape[1]
        heads = prepare_qkv(
            self.qkv_proj(x).unflatten(-1, (3, self.n_heads, self.head_dim)),
            scale=self.qk_scale,
            base=self.rotary_base if self.position_bias is None else None,
            start=cached,
        )
        q, k, v = heads.q, heads.k, heads.v
        if not self.causal:
            y = self._attend(q, k, v, None, padding)
            return MixerOutput(self.out_proj(y.flatten(2)), None, aux={})
        if state is not None:
            k = torch.cat([state.k.to(k.dtype), k], 1)
            v = torch.cat([state.v.to(v.dtype), v], 1)
        y = self._attend(q, k, v, document_starts(clock, cached), None)
        return MixerOutput(
            self.out_proj(y.flatten(2)), AttentionState(*clock.after(x), k, v), aux={}
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        """q (B, T, H, K), k and v (B, S + T, H, K), starts (B, T) first keys, padding (B, T)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scale, causal, n_keys = self.scale, self.causal, k.shape[2]
        tokens = None if padding is None else ~padding[:, None, None]
        if self.position_bias is None and (starts is None or not causal):
            return masked_attention(q, k, v, tokens, scale, causal=causal).transpose(1, 2)
        bias = None
        if self.position_bias is not None:
            nearest = 0 if causal else 1 - n_keys
            bias = self.position_bias(torch.arange(nearest, n_keys, device=q.device))
        cached, outputs = n_keys - q.shape[2], []
        key = torch.arange(n_keys, device=k.device)
        for start in range(0, q.shape[2], QUERY_BLOCK):
            rows = q[:, :, start : start + QUERY_BLOCK]
            last = cached + start + rows.shape[2]
            end = last if causal else n_keys
            mask = tokens
            if causal:
                mask = key[:end] <= key[cached + start : end, None]
                if starts is not None:
                    first = starts[:, start : start + QUERY_BLOCK, None]
                    mask = (mask & (key[:end] >= first)).unsqueeze(1)
            if bias is not None:
                newest = last - 1 + (0 if causal else n_keys - 1)  # its place in `bias`
                matrix = toeplitz_bias(bias, rows.shape[2], end, newest).to(q.dtype)
                mask = matrix if mask is None else matrix.masked_fill(~mask, -torch.inf)
                mask = mask.expand(len(q), -1, -1, -1)
            outputs.append(masked_attention(rows, k[:, :, :end], v[:, :, :end], mask, scale))
        return torch.cat(outputs, 2).transpose(1, 2)

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> AttentionState:
        cache = torch.zeros(batch_size, 0, self.n_heads, self.head_dim, device=device, dtype=dtype)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return AttentionState(position, cache.new_empty(batch_size, 0, 0), cache, cache)

    def flops_per_token(self, context: int) -> float:
        visible = (context + 1) / 2 if self.causal else context
        return 8 * self.d_model * self.width + 4 * self.width * visible

    def executed_flops(self, length: int) -> float:
        return length * (8 * self.d_model * self.width + 4 * self.width * length)

    def no_decay_parameters(self) -> set[str]:
        return set() if self.position_bias is None else {"position_bias.table"}


def document_starts(clock: Clock, cached: int) -> Tensor | None:
    """(B, T): index, in the cache and then the call, of the first token of each token's document.

    None when the call begins a document and holds no other.
    """
    if clock.position is None and clock.resets is None:
        return None
    if clock.position is not None:
        begin = (cached - clock.position).unsqueeze(1)
    else:
        assert clock.resets is not None
        begin = torch.zeros_like(clock.resets[:, :1], dtype=torch.int64)
    if clock.resets is None:
        return begin.expand(-1, clock.length)
    device = clock.resets.device
    offsets = cached + torch.arange(
        clock.edges.start, clock.edges.stop, clock.edges.step, device=device
    )
    # The latest document start at or before each edge, then spread over the tokens up to the next.
    latest = torch.where(clock.resets, offsets, begin).cummax(1).values
    latest = torch.cat([begin, latest], 1)
    tokens = torch.arange(clock.length, device=device)
    seen = (tokens - clock.edges.start).div(clock.edges.step, rounding_mode="floor") + 1
    return latest[:, seen.clamp(min=0)]
