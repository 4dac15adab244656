"""Block-Recurrent Transformer cell (Hutchins et al. 2022, 2203.07852): BST's rival.

Vertically, the tokens of block b read a sliding window and the S states s_b:

    y = [softmax(g QK^T + window) V ; softmax(g2 Q2 Ks^T) Vs] Wo

Horizontally, once the block is complete, its states read themselves and the tokens of this block
and of the one before, and a fixed gate mixes the result in ("fixed:skip": no second MLP):

    Qs, Ks, Vs, Qs2 = norm(s_b) + ids
    h = [softmax(g3 Qs Ks^T) Vs ; softmax(g4 Qs2 K^T) V]
    s_{b+1} = sigmoid(f) s_b + (1 - sigmoid(f)) (h Wh + b)

Shapes: B batch, T time, D model width, H heads, K head width, W block size, S states, n blocks.

Blocks wait for one another here, which is what BST does away with; the loop runs over blocks.

The authors' (their code): the equations, parallel and concatenated; tokens' keys and values shared
by both directions, the states' own; L2-normalised queries and keys with a scale per head for each
of the four attentions; no positions across directions; state ids from N(0, 1), initial states from
N(0, 0.1). Ours: scales start at sqrt(K) instead of 1; f starts at 1; rotary positions in the window
by default (`position="t5"` is theirs); documents hide what came before them, where their code reads
zero keys. They carry states without a gradient from segment to segment, as the trainer here does.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.mixers.attention import check_heads, position_bias, qk_scale
from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.ops.masked_attention import masked_attention
from pretrain.ops.normalization import prepare_heads, rms_norm
from pretrain.ops.numerics import no_autocast, wide_dtype
from pretrain.ops.qkv_heads import last_tokens
from pretrain.ops.state_attention import state_attention
from pretrain.ops.window_attention import window_attention


class BlockRecurrentState(NamedTuple):
    """With r tokens of the present block seen: k, v (B, W + r, H, K), as projected; recurrent
    (B, S, D), what the present block reads, in at least fp32."""

    position: Tensor
    phase: Tensor
    k: Tensor
    v: Tensor
    recurrent: Tensor


class BlockRecurrent(TokenMixer):
    """Sliding-window attention beside attention to states that every block rewrites.

    Args:
        d_model: model width.
        n_heads: heads of each of the four attentions.
        block_size: W, tokens per block and of the window; documents begin on its multiples.
        n_states: S.
        position: of the window: "rotary", or "t5" for T5's bias by bucket of distance.
        rotary_base: base of the rotary wavelengths.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 8,
        block_size: int = 512,
        n_states: int = 512,
        position: Literal["rotary", "t5"] = "rotary",
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        for key, value in (("block_size", block_size), ("n_states", n_states)):
            if value < 1:
                raise ValueError(f"block_recurrent.{key}={value} must be at least 1")
        self.d_model, self.n_heads, self.n_states = d_model, n_heads, n_states
        self.head_dim = check_heads("block_recurrent", d_model, n_heads)
        self.block_size = self.reset_grid = block_size
        self.rotary_base = rotary_base
        self.position_bias = position_bias("block_recurrent", position, n_heads)
        self.qkv_proj = nn.Linear(d_model, 4 * d_model, bias=False)  # q, k, v and q2
        self.state_proj = nn.Linear(d_model, 4 * d_model, bias=False)  # the same of the states
        scales = [qk_scale(n_heads, self.head_dim) for _ in range(4)]
        self.qk_scale, self.context_scale, self.state_scale, self.token_scale = scales
        self.state_norm = nn.Parameter(torch.ones(d_model))
        self.ids = nn.Parameter(torch.randn(n_states, d_model))
        self.initial = nn.Parameter(0.1 * torch.randn(n_states, d_model))
        self.update_proj = nn.Linear(2 * d_model, d_model)
        self.keep = nn.Parameter(torch.ones(d_model))
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: BlockRecurrentState | None = None, *, resets: Tensor | None = None
    ) -> MixerOutput:
        clock, w = self.clock(x, state, resets), self.block_size
        q, k, v, q2 = self.qkv_proj(x).unflatten(-1, (4, self.n_heads, self.head_dim)).unbind(2)
        if state is not None:
            k, v = (torch.cat([a.to(b.dtype), b], 1) for a, b in ((state.k, k), (state.v, v)))
        offset, fresh = clock.phase % w, clock.fresh_blocks(w)
        before = 0 if state is None else w  # cached tokens of the previous block
        own = self._window(q, k[:, offset:], v[:, offset:], offset, fresh)

        wide = wide_dtype(x)
        initial = self.initial.to(wide).expand(x.shape[0], -1, -1)
        s = initial if state is None else state.recurrent.to(wide)
        keys, values = [], []
        for block in range(-(-(offset + clock.length) // w)):
            begins = None
            if fresh is not None and block < fresh.shape[1]:
                begins = fresh[:, block, None, None]
                s = torch.where(begins, initial, s)
            normed = rms_norm(s, self.state_norm)
            projected = self.state_proj(normed + self.ids.to(normed.dtype))
            qs, ks, vs, qs2 = projected.unflatten(-1, (4, self.n_heads, self.head_dim)).unbind(2)
            ks = prepare_heads(ks, normalize=True)
            keys.append(ks)
            values.append(vs)
            start = before + block * w
            if offset + clock.length >= (block + 1) * w:
                tokens = slice(max(0, start - w), start + w)
                h = self._read(qs, ks, vs, qs2, k[:, tokens], v[:, tokens], begins)
                s = self._mix(s, self.update_proj(h))
        context = state_attention(
            prepare_heads(q2, normalize=True, scale=self.context_scale),
            torch.stack(keys, 1),
            torch.stack(values, 1),
            block_size=w,
            offset=offset,
            scale=1.0,
        )
        y = self.out_proj(torch.cat([own, context], 2).flatten(2))
        keep = w + (offset + clock.length) % w
        k, v = last_tokens(k, keep), last_tokens(v, keep)
        return MixerOutput(y, BlockRecurrentState(*clock.after(x), k, v, s.clone()), aux={})

    def _window(self, q: Tensor, k: Tensor, v: Tensor, offset: int, fresh: Tensor | None) -> Tensor:
        """Tokens read the last W tokens: q (B, T, H, K), k and v (B, 0 or W + T, H, K)."""
        cached, base = k.shape[1] - q.shape[1], self.rotary_base
        bias = None
        if self.position_bias is not None:
            bias = self.position_bias(torch.arange(self.block_size, device=q.device))
        starts = (cached, 0) if bias is None else (None, None)
        return window_attention(
            prepare_heads(q, normalize=True, scale=self.qk_scale, start=starts[0], base=base),
            prepare_heads(k, normalize=True, start=starts[1], base=base),
            v,
            block_size=self.block_size,
            reach="window",
            offset=offset,
            fresh=fresh,
            scale=1.0,
            bias=bias,
        )

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q2: Tensor,
        token_k: Tensor,
        token_v: Tensor,
        begins: Tensor | None,
    ) -> Tensor:
        """States (B, S, H, K) read themselves and tokens (B, W or 2W, H, K) -> (B, S, 2D).

        `begins` (B, 1, 1): the document begins with this block, the one before is another's.
        """
        q = prepare_heads(q, normalize=True, scale=self.state_scale).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), scale=1.0)
        q2 = prepare_heads(q2, normalize=True, scale=self.token_scale).transpose(1, 2)
        token_k = prepare_heads(token_k, normalize=True).transpose(1, 2)
        token_v = token_v.transpose(1, 2)
        count = token_k.shape[2]
        if begins is None or count == self.block_size:
            y2 = F.scaled_dot_product_attention(q2, token_k, token_v, scale=1.0)
        else:
            present = torch.arange(count, device=q.device) >= self.block_size
            visible = (present | ~begins).unsqueeze(1).expand(-1, 1, self.n_states, -1)
            y2 = masked_attention(q2, token_k, token_v, visible, 1.0)
        return torch.cat([y, y2], 1).transpose(1, 2).flatten(2)

    def _mix(self, s: Tensor, update: Tensor) -> Tensor:
        """The fixed gate, in at least fp32."""
        with no_autocast(s):
            keep = self.keep.to(s.dtype).sigmoid()
            return keep * s + (1 - keep) * update.to(s.dtype)

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> BlockRecurrentState:
        heads = (self.n_heads, self.head_dim)
        cache = torch.zeros(batch_size, self.block_size, *heads, device=device, dtype=dtype)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # Zeros do: the first block of a document reads the learned states wherever it begins.
        wide = torch.promote_types(dtype, torch.float32)
        s = torch.zeros(batch_size, self.n_states, self.d_model, device=device, dtype=wide)
        return BlockRecurrentState(position, cache.new_empty(batch_size, 0, 0), cache, cache, s)

    def flops_per_token(self, context: int) -> float:
        w = min(self.block_size, context)
        visible = w - w * (w - 1) / (2 * context) + self.n_states
        tokens = 12 * self.d_model**2 + 4 * self.d_model * visible
        return tokens + self._recurrence_flops(context) / context

    def executed_flops(self, length: int) -> float:
        scores = min(length, self.block_size) ** 2 + length * self.n_states
        scores += max(0, length - self.block_size) * 2 * self.block_size
        tokens = 12 * length * self.d_model**2 + 4 * self.d_model * scores
        return tokens + self._recurrence_flops(length)

    def _recurrence_flops(self, length: int) -> float:
        """Projections of every block's states, and the updates after whole blocks."""
        d, states, w = self.d_model, self.n_states, self.block_size
        touched, whole = -(-length // w), length // w
        read = whole * states + max(0, 2 * whole - 1) * w
        return states * (8 * d**2 * touched + 4 * d**2 * whole + 4 * d * read)

    def no_decay_parameters(self) -> set[str]:
        bias = set() if self.position_bias is None else {"position_bias.table"}
        return bias | {"ids", "initial"}

    @torch.no_grad()
    def health(self) -> dict[str, Tensor]:
        """The gate keeps sigmoid(f) of a channel per block; what updates copy on is not counted."""
        return {"memory_horizon": -self.block_size / F.logsigmoid(self.keep.double())}
