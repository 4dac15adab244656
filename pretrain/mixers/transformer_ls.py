"""Transformer-LS: a sliding window and a dynamic low-rank projection of what lies before it
(Zhu et al. 2021, 2107.02192), as a decoder.

    q, k, v = x W                           p = x W_p, r numbers per head
    w = softmax of p over a chunk           k~, v~ = w^T k, w^T v: r summaries of each chunk
    y = softmax([q LN_l(k) ; q LN_s(k~)]) [LN_l(v) ; LN_s(v~)] W_o

Shapes: B batch, T time, D model width, H heads, K head width, W window size, C chunk size, r rank,
M chunks kept.

What a chunk is summarised to depends on its tokens alone (hence "dynamic") and not on the query, so
each chunk is compressed once. The two LayerNorms ("DualLN") are what lets one softmax compare keys
with means of keys, whose norms are smaller.

Known: window plus projection under one softmax, projections of x softmaxed over the sequence, the
two norms. Ours, where the text was not at hand: projections per chunk, as a decoder needs; a query
sees the summaries of chunks that ended before its own *block* of W tokens began, and of those the
last M, so that the state is of constant size; the window is exactly the last W tokens, so that up
to W tokens are seen both ways; rotary positions in the window, none among summaries; the norms span
the whole width and serve keys and values alike.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.mixers.attention import check_heads
from pretrain.mixers.base import Clock, MixerOutput, TokenMixer
from pretrain.ops.normalization import prepare_heads
from pretrain.ops.qkv_heads import last_tokens
from pretrain.ops.summary_attention import summarise_chunks, summary_attention


class LongShortState(NamedTuple):
    """With t tokens of the present block seen: k, v (B, W, H, K) of the last W tokens, as
    projected; scores (B, t, H, r), p of the present block; bank_k, bank_v (B, M, r, H, K), the
    summaries of the last M chunks of earlier blocks."""

    position: Tensor
    phase: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    bank_k: Tensor
    bank_v: Tensor


class TransformerLS(TokenMixer):
    """Window attention beside attention to summaries of the last `kept_chunks` chunks.

    Args:
        d_model: model width.
        n_heads: attention heads.
        window_size: W, visible tokens, the present one included; documents begin on its multiples.
        chunk_size: C, tokens that are summarised together, a divisor of `window_size`.
        rank: r, summaries per chunk and head.
        kept_chunks: M; summaries reach back M C tokens from the start of the present block.
        rotary_base: base of the rotary wavelengths.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 8,
        window_size: int = 512,
        chunk_size: int = 16,
        rank: int = 1,
        kept_chunks: int = 256,
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        if window_size < 1:
            raise ValueError(f"transformer_ls.window_size={window_size} must be at least 1 token")
        if chunk_size < 1 or window_size % chunk_size:
            raise ValueError(
                f"transformer_ls.chunk_size={chunk_size} does not divide "
                f"window_size={window_size}: chunks must end where blocks do"
            )
        for key, value in {"rank": rank, "kept_chunks": kept_chunks}.items():
            if value < 1:
                raise ValueError(
                    f"transformer_ls.{key}={value} must be at least 1: without summaries choose swa"
                )
        self.d_model, self.n_heads, self.window_size = d_model, n_heads, window_size
        self.chunk_size, self.rank, self.kept_chunks = chunk_size, rank, kept_chunks
        self.chunks_per_block = window_size // chunk_size
        self.block_size = self.reset_grid = window_size
        self.head_dim = check_heads("transformer_ls", d_model, n_heads)
        self.rotary_base = rotary_base
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.score_proj = nn.Linear(d_model, n_heads * rank, bias=False)
        self.local_norm = nn.LayerNorm(d_model)
        self.summary_norm = nn.LayerNorm(d_model)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: LongShortState | None = None, *, resets: Tensor | None = None
    ) -> MixerOutput:
        clock = self.clock(x, state, resets)
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.n_heads, self.head_dim)).unbind(2)
        scores = self.score_proj(x).unflatten(-1, (self.n_heads, self.rank))
        if state is not None:
            k, v = (torch.cat([a.to(b.dtype), b], 1) for a, b in ((state.k, k), (state.v, v)))
            scores = torch.cat([state.scores.to(scores.dtype), scores], 1)
        cached, offset = k.shape[1] - q.shape[1], clock.phase % self.window_size

        # Whole blocks become summaries, the one that an earlier call has begun included.
        whole = scores.shape[1] // self.window_size
        blocks = -(-scores.shape[1] // self.window_size)
        finished = slice(cached - offset, cached - offset + whole * self.window_size)
        banks = [
            summarise_chunks(
                part[:, finished], scores[:, : whole * self.window_size], self.chunk_size
            )
            for part in (k, v)
        ]
        if state is not None:
            before = (state.bank_k, state.bank_v)
            banks = [torch.cat([a.to(b.dtype), b], 1) for a, b in zip(before, banks, strict=True)]
        else:  # so many zeros that the last M always exist
            banks = [F.pad(bank, (0,) * 6 + (self.kept_chunks, 0)) for bank in banks]
        bank_k, bank_v = (self._per_block(bank, blocks, state is None) for bank in banks)

        base, fresh = self.rotary_base, clock.fresh_blocks(self.window_size)
        y = summary_attention(
            prepare_heads(q, start=cached, base=base),
            prepare_heads(_normed(self.local_norm, k), start=0, base=base),
            _normed(self.local_norm, v),
            q,
            _normed(self.summary_norm, bank_k),
            _normed(self.summary_norm, bank_v),
            self._known(x, clock, fresh, blocks, bank_k.shape[2]),
            block_size=self.window_size,
            offset=offset,
            fresh=fresh,
        )
        state = LongShortState(
            *clock.after(x),
            last_tokens(k, self.window_size),
            last_tokens(v, self.window_size),
            scores[:, whole * self.window_size :].clone(),
            *(bank[:, -self.kept_chunks :].clone() for bank in banks),
        )
        return MixerOutput(self.out_proj(y.flatten(2)), state, aux={})

    def _per_block(self, bank: Tensor, blocks: int, from_start: bool) -> Tensor:
        """bank (B, M + chunks, r, H, K) -> (B, n, S, H, K), the last S / r chunks before each of
        the n blocks."""
        windows = bank.unfold(1, self.kept_chunks, self.chunks_per_block)[:, :blocks]
        windows = windows.movedim(-1, 2)  # (B, n, M, r, H, K)
        if from_start:  # there is nothing before the call
            windows = windows[:, :, self.kept_chunks - self._most_chunks(blocks) :]
        return windows.flatten(2, 3)

    def _most_chunks(self, blocks: int) -> int:
        """Chunks that the last of `blocks` blocks of a document sees."""
        return min(self.kept_chunks, (blocks - 1) * self.chunks_per_block)

    def _known(
        self, x: Tensor, clock: Clock, fresh: Tensor | None, blocks: int, summaries: int
    ) -> Tensor:
        """(B or 1, n, S) bool: the summary is of the block's own document."""
        index = torch.arange(blocks, device=x.device)
        age = index.unsqueeze(0)  # whole blocks of the document before each block
        if fresh is not None:
            before = index.new_zeros(1) if clock.position is None else clock.position
            begin = -before.div(self.window_size, rounding_mode="floor").unsqueeze(1)
            fresh = F.pad(fresh, (0, blocks - fresh.shape[1]))
            age = index - torch.where(fresh, index, begin).cummax(1).values
        chunks = summaries // self.rank
        back = torch.arange(chunks, 0, -1, device=x.device).repeat_interleave(self.rank)
        return back <= age.unsqueeze(-1) * self.chunks_per_block

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> LongShortState:
        heads = (self.n_heads, self.head_dim)
        cache = torch.zeros(batch_size, self.window_size, *heads, device=device, dtype=dtype)
        bank = cache.new_zeros(batch_size, self.kept_chunks, self.rank, *heads)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return LongShortState(
            position,
            cache.new_empty(batch_size, 0, 0),
            cache,
            cache,
            cache.new_empty(batch_size, 0, self.n_heads, self.rank),
            bank,
            bank,
        )

    def flops_per_token(self, context: int) -> float:
        w = min(self.window_size, context)
        visible = w - w * (w - 1) / (2 * context)
        blocks = -(-context // self.window_size)
        summaries = sum(
            self._most_chunks(block + 1) * min(self.window_size, context - block * self.window_size)
            for block in range(blocks)
        )
        attention = 4 * self.d_model * (visible + self.rank * summaries / context)
        return self._projections() + 4 * self.d_model * self.rank + attention

    def executed_flops(self, length: int) -> float:
        w, whole = self.window_size, length // self.window_size
        tail = length - whole * w
        scores = min(whole, 1) * w**2 + max(whole - 1, 0) * 2 * w**2
        scores += tail * (tail + w * min(whole, 1))
        scores += length * self.rank * self._most_chunks(-(-length // w))
        summaries = 4 * self.d_model * self.rank * whole * w
        return length * self._projections() + summaries + 4 * self.d_model * scores

    def _projections(self) -> int:
        return 8 * self.d_model**2 + 2 * self.d_model * self.n_heads * self.rank


def _normed(norm: nn.LayerNorm, heads: Tensor) -> Tensor:
    """LayerNorm over all heads together, heads (..., H, K)."""
    return norm(heads.flatten(-2)).to(heads.dtype).unflatten(-1, heads.shape[-2:])
