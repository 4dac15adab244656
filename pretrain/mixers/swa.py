"""Sliding-window attention over the last W tokens, itself included (Slide in 2306.09539).

Shapes: B batch, T time, D model width, H heads, K head width, W window size.

Exactly W at every token and not a block approximation: the window of the first token of a block is
as long as that of the last.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.mixers.attention import check_heads, position_bias, qk_scale
from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.ops.projected_window import projected_window_attention
from pretrain.ops.qkv_heads import prepare_qkv
from pretrain.ops.symmetric_window_attention import symmetric_window_attention


class WindowState(NamedTuple):
    """k, v: (B, W, H, K), the last W tokens; keys as projected, since positions are counted from
    the start of the cache. Entries older than `position` belong to another document."""

    position: Tensor
    phase: Tensor
    k: Tensor
    v: Tensor


class SlidingWindowAttention(TokenMixer):
    """Softmax attention over the last `window_size` tokens, or symmetrically over both sides.

    Args:
        d_model: model width.
        causal: False for encoders: keys less than `window_size` away on either side are visible.
        n_heads: attention heads.
        window_size: visible tokens, the present one included; documents begin on its multiples.
        qk_norm: L2-normalise queries and keys, with a learned scale per head.
        position: "rotary", or "t5" for T5's bias by bucket of distance.
        rotary_base: base of the rotary wavelengths.
    """

    two_sided = True

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        n_heads: int = 8,
        window_size: int = 512,
        qk_norm: bool = False,
        position: Literal["rotary", "t5"] = "rotary",
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if window_size < 1:
            raise ValueError(f"swa.window_size={window_size} must be at least 1 token")
        self.d_model, self.n_heads, self.window_size = d_model, n_heads, window_size
        self.causal = causal
        self.block_size = self.reset_grid = window_size
        self.head_dim = check_heads("swa", d_model, n_heads)
        self.rotary_base = rotary_base
        self.position_bias = position_bias("swa", position, n_heads, causal=causal)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.qk_scale = qk_scale(n_heads, self.head_dim) if qk_norm else None
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: WindowState | None = None,
        *,
        resets: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> MixerOutput:
        self.check_sides(state, resets, padding)
        clock = self.clock(x, state, resets)
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        base = self.rotary_base if self.position_bias is None else None
        if not self.causal:
            heads = prepare_qkv(qkv, scale=self.qk_scale, base=base)
            y = self._attend_both_sides(heads.q, heads.k, heads.v, padding)
            return MixerOutput(self.out_proj(y.flatten(2)), None, aux={})
        bias = None
        if self.position_bias is not None:
            bias = self.position_bias(torch.arange(self.window_size, device=x.device))
        y, kept = projected_window_attention(
            qkv,
            None if state is None else (state.k, state.v),
            block_size=self.window_size,
            scale=self.qk_scale,
            base=base,
            keep=self.window_size,
            offset=clock.phase % self.window_size,
            fresh=clock.fresh_blocks(self.window_size),
            bias=bias,
        )
        state = WindowState(*clock.after(x), *kept)
        return MixerOutput(self.out_proj(y.flatten(2)), state, aux={})

    def _attend_both_sides(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """Prepared q and k, v (B, T, H, K), padding (B, T) -> (B, T, H, K)."""
        bias = None
        if self.position_bias is not None:
            reach = torch.arange(1 - self.window_size, self.window_size, device=q.device)
            bias = self.position_bias(reach)
        return symmetric_window_attention(
            q,
            k,
            v,
            window_size=self.window_size,
            padding=padding,
            scale=1.0 if self.qk_scale is not None else None,
            bias=bias,
        )

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> WindowState:
        cache = torch.zeros(
            batch_size, self.window_size, self.n_heads, self.head_dim, device=device, dtype=dtype
        )
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return WindowState(position, cache.new_empty(batch_size, 0, 0), cache, cache)

    def flops_per_token(self, context: int) -> float:
        w = min(self.window_size, context)
        visible = w - w * (w - 1) / (2 * context)
        if not self.causal:
            visible = 2 * visible - 1
        return 8 * self.d_model**2 + 4 * self.d_model * visible

    def no_decay_parameters(self) -> set[str]:
        return set() if self.position_bias is None else {"position_bias.table"}

    def executed_flops(self, length: int) -> float:
        if not self.causal:
            blocks = -(-length // self.window_size)
            scores = blocks * 3 * self.window_size**2
            return length * 8 * self.d_model**2 + 4 * self.d_model * scores
        scores = min(length, self.window_size) ** 2
        scores += max(0, length - self.window_size) * 2 * self.window_size
        return length * 8 * self.d_model**2 + 4 * self.d_model * scores
