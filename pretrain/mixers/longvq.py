"""LongVQ: gated attention over vector-quantised keys (Liu et al. 2024, 2404.11163).

    m = silu(SSM(x));  q, k, v, r, p, u as in MEGA (see mega.py)
    q, k = g q / |q|, k / |k|  per head;    z_j = argmin_s |k_j - C_s|^2
    o = softmax(q . k^ + local bias) v      k^_j = C[z_j], see pretrain/ops/vq_attention.py
    y = silu(p + (r o) Wh),  written to the stream as x + u (y - x)

Shapes: B batch, T time, D model width, H heads, S codes, K key width, E value width, V = E / H,
W block size, N modes.

Its memory is of fixed size and sees everything: W to 2W tokens one by one, all older ones as a
count and a mean value per code. Only the recent ones have positions, the codebook has none.

The paper's, as far as its text could be had (abstract and reviews): quantised keys with a
straight-through estimator, an SSM in front of a gated attention, a local window with a position
bias beside the codebook, memory of fixed size. Ours, that is not known of the paper: MEGA's gated
unit and S4D (or MEGA's EMA) as that SSM; Transformer-VQ's cache (2309.16354); normalised keys and a
learned scale; codebook by exponential averages, its size, the commitment weight, restarts.

The two-sided form is ours too: own block and both neighbours key by key, every other key through
its code. Blocks are counted from a lane's first token, pads are in no block and in no statistic.

The codebook is a buffer (codebook.py). A training forward reports what fell on each code in `aux`,
and `update_buffers` moves the codebook once per optimizer step, so within a step it is constant. A
code that restarts remembers when, and so does every state: where they differ, the state's count and
mean of that code become zero and its cached keys are forgotten.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.mixers.attention import check_heads, qk_scale
from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.mixers.codebook import Codebook
from pretrain.mixers.ema import EMAFilter
from pretrain.mixers.mega import GatedUnit, check_gated_options
from pretrain.mixers.s4d import DiagonalSSM, check_ssm_options
from pretrain.ops.normalization import prepare_heads
from pretrain.ops.numerics import no_autocast, wide_dtype
from pretrain.ops.qkv_heads import last_tokens
from pretrain.ops.relative_bias import T5Bias
from pretrain.ops.vq_attention import (
    FORGOTTEN,
    VQCache,
    look_up,
    straight_through,
    two_sided_vq_attention,
    vq_attention,
)
from pretrain.ops.window_attention import cached_keys


class LongVQState(NamedTuple):
    """ssm: of the SSM. With r tokens of the present block seen: k (B, W + r, H, K), normalised,
    code (B, W + r, H), v (B, W + r, H, V). counts (B, H, S) and means (B, H, S, V): see `VQCache`;
    born (B, H, S): the codebook's when they were counted."""

    position: Tensor
    phase: Tensor
    ssm: Tensor
    k: Tensor
    code: Tensor
    v: Tensor
    counts: Tensor
    means: Tensor
    born: Tensor


class LongVQ(TokenMixer):
    """Gated attention to recent keys one by one and to all older ones through a codebook.

    Args:
        d_model: model width.
        causal: False for encoders: own block and both neighbours key by key, all else by codes;
            blocks are counted from the first token that is no pad.
        block_size: W; documents begin on its multiples.
        n_heads: heads of the attention, each with its own codebook.
        n_codes: S, codes per head.
        d_shared: H K, width of all queries; 0: a quarter of the model width.
        d_value: E, width of all values; 0: twice the model width.
        memory: "s4d" or "ema", what q, k and the gates are computed from.
        n_modes: N, modes of that memory per channel.
        dt_min: smallest initial step size of "s4d".
        dt_max: largest initial step size of "s4d".
        position: "t5", a bias per distance and layer, or "rotary"; of recent keys only.
        commitment: weight of |k - C[z]|^2 in the loss, summed over heads.
        codebook_decay: of the codebook's averages, per optimizer step.
        seed: of the places where dead codes restart.
        chunk_size: tokens per chunk of the memory; divides `block_size`; speed only.
        rotary_base: base of the rotary wavelengths.
    """

    two_sided = True
    takes_counted = True

    def __init__(
        self,
        d_model: int,
        *,
        causal: bool = True,
        block_size: int = 512,
        n_heads: int = 1,
        n_codes: int = 512,
        d_shared: int = 0,
        d_value: int = 0,
        memory: Literal["s4d", "ema"] = "s4d",
        n_modes: int = 16,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        position: Literal["t5", "rotary"] = "t5",
        commitment: float = 0.01,
        codebook_decay: float = 0.99,
        seed: int = 0,
        chunk_size: int = 64,
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        check_gated_options("longvq", d_model, d_shared, d_value, n_modes)
        self.d_shared, self.d_value = d_shared or d_model // 4, d_value or 2 * d_model
        check_vq_options(n_heads, n_codes, commitment, codebook_decay, self.d_value)
        if memory not in ("s4d", "ema"):
            raise ValueError(f"longvq.memory={memory!r} is unknown: choose s4d or ema")
        if position not in ("t5", "rotary"):
            raise ValueError(f"longvq.position={position!r} is unknown: choose t5 or rotary")
        if chunk_size < 1 or block_size < 1 or block_size % chunk_size:
            raise ValueError(
                f"longvq.chunk_size={chunk_size} does not divide block_size={block_size}: "
                f"documents begin on blocks and the memory's chunks must end there"
            )
        self.d_model, self.n_heads, self.n_codes, self.n_modes = d_model, n_heads, n_codes, n_modes
        self.head_dim = check_heads("longvq", self.d_shared, n_heads)
        self.block_size = self.reset_grid = block_size
        self.chunk_size, self.commitment, self.rotary_base = chunk_size, commitment, rotary_base
        self.ssm: DiagonalSSM | EMAFilter
        if memory == "ema":
            self.ssm = EMAFilter(d_model, n_modes, chunk_size, causal=causal)
        else:
            check_ssm_options("longvq", n_modes, dt_min, dt_max, "lin")
            self.ssm = DiagonalSSM(
                d_model,
                n_modes=n_modes,
                dt_min=dt_min,
                dt_max=dt_max,
                chunk_size=chunk_size,
                causal=causal,
            )
        self.unit = GatedUnit(d_model, self.d_shared, self.d_value)
        self.qk_scale = qk_scale(n_heads, self.head_dim)
        self.causal = causal
        self.bias = T5Bias(n_heads, causal=causal) if position == "t5" else None
        self.codes = Codebook(n_heads, n_codes, self.head_dim, codebook_decay, seed)

    def forward(
        self,
        x: Tensor,
        state: LongVQState | None = None,
        *,
        resets: Tensor | None = None,
        counted: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> MixerOutput:
        self.check_sides(state, resets, padding)
        if padding is not None:
            x = x.masked_fill(padding.unsqueeze(-1), 0)
            counted = ~padding if counted is None else counted & ~padding
        clock = self.clock(x, state, resets)
        m, ssm = self.ssm(x, None if state is None else state.ssm, clock.resets, clock.edges)
        parts = self.unit(x, F.silu(m))
        q, k, v = (c.unflatten(-1, (self.n_heads, -1)) for c in (parts.q, parts.k, parts.v))
        q = prepare_heads(q, normalize=True, scale=self.qk_scale)
        k = prepare_heads(k, normalize=True)
        book = self.codes.codebook
        code = self.codes(k)
        aux = self._report(k, code, counted) if self.training else {}
        if not self.causal:
            o = self._attend_both_sides(q, k, code, v, padding)
            return MixerOutput(self.unit.finish(parts, o.flatten(2)), None, aux, gate=parts.u)
        cache = self._empty_cache(x)
        if state is not None:
            alive = state.born == self.codes.born
            cache = VQCache(state.counts * alive, state.means * alive.unsqueeze(-1))
            known = alive.gather(2, state.code.clamp(min=0).transpose(1, 2)).transpose(1, 2)
            code = torch.cat([torch.where(known, state.code, FORGOTTEN), code], 1)
            k, v = (torch.cat([a.to(b.dtype), b], 1) for a, b in ((state.k, k), (state.v, v)))

        local_q, local_k, bias = q, straight_through(k, code, book), None
        if self.bias is not None:
            bias = self.bias(torch.arange(2 * self.block_size, device=x.device))
        else:
            cached, base = k.shape[1] - q.shape[1], self.rotary_base
            local_q = prepare_heads(q, start=cached, base=base)
            local_k = prepare_heads(local_k, start=0, base=base)
        offset = clock.phase % self.block_size
        o, cache = vq_attention(
            q,
            local_q,
            local_k,
            code,
            v,
            book,
            cache,
            bias,
            block_size=self.block_size,
            offset=offset,
            fresh=clock.fresh_blocks(self.block_size),
        )
        offset = (offset + clock.length) % self.block_size
        keep = cached_keys("own_and_previous", self.block_size, offset)
        after = LongVQState(
            *clock.after(x),
            ssm,
            last_tokens(k, keep),
            last_tokens(code.unsqueeze(-1), keep).squeeze(-1),
            last_tokens(v, keep),
            *cache,
            self.codes.born.repeat(x.shape[0], 1, 1),
        )
        y = self.unit.finish(parts, o.flatten(2))
        return MixerOutput(y, after, aux, gate=parts.u)

    def _attend_both_sides(
        self, q: Tensor, k: Tensor, code: Tensor, v: Tensor, padding: Tensor | None
    ) -> Tensor:
        """q, k (B, T, H, K), code (B, T, H), v (B, T, H, V), padding (B, T) -> (B, T, H, V)."""
        order = None
        if padding is not None:
            # Tokens first: blocks then do not depend on how many pads stand in front of them.
            code = code.masked_fill(padding.unsqueeze(-1), FORGOTTEN)
            order = padding.int().argsort(dim=1, stable=True)
            lane = torch.arange(q.shape[0], device=q.device).unsqueeze(1)
            q, k, code, v = (part[lane, order] for part in (q, k, code, v))
        book, w = self.codes.codebook, self.block_size
        local_q, local_k, bias = q, straight_through(k, code, book), None
        if self.bias is not None:
            bias = self.bias(torch.arange(1 - 2 * w, 2 * w, device=q.device))
        else:
            local_q = prepare_heads(q, start=0, base=self.rotary_base)
            local_k = prepare_heads(local_k, start=0, base=self.rotary_base)
        o = two_sided_vq_attention(q, local_q, local_k, code, v, book, bias, block_size=w)
        return o if order is None else o[lane, order.argsort(1)]

    def _report(self, k: Tensor, code: Tensor, counted: Tensor | None) -> dict[str, Tensor]:
        """The commitment loss, and what falls on each code."""
        with no_autocast(k):
            wide = k.to(wide_dtype(k))
            error = (wide - look_up(code, self.codes.codebook)).square().sum((2, 3))
            if counted is not None:
                error = error * counted
            with torch.no_grad():
                statistics = self.codes.statistics(k, code, counted)
        return {"commitment_loss": self.commitment * error.sum(), **statistics}

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        self.codes.update(statistics)

    @torch.no_grad()
    def health(self) -> dict[str, Tensor]:
        """See `TokenMixer.health`."""
        return {**self.ssm.health(), **self.codes.health()}

    def _empty_cache(self, x: Tensor) -> VQCache:
        shape = (x.shape[0], self.n_heads, self.n_codes)
        count = x.new_zeros(shape, dtype=wide_dtype(x))
        return VQCache(count, count.new_zeros(*shape, self.d_value // self.n_heads))

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> LongVQState:
        lane = torch.zeros(batch_size, self.block_size, self.n_heads, device=device, dtype=dtype)
        empty = self._empty_cache(lane)
        return LongVQState(
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            lane.new_empty(batch_size, 0, 0),
            self.ssm.init_state(batch_size, device=device, dtype=dtype),
            lane.new_zeros(*lane.shape, self.head_dim),
            torch.zeros_like(lane, dtype=torch.int64),
            lane.new_zeros(*lane.shape, self.d_value // self.n_heads),
            *empty,
            torch.zeros_like(empty.counts, dtype=torch.int64),
        )

    def flops_per_token(self, context: int) -> float:
        # Whole blocks are assumed. Which code is nearest asks for a product with the codebook too.
        w = min(self.block_size, context)
        recent = (w + 1) / 2 + (context - w) / context * w
        codes = max(0, context - 2 * w) / context * self.n_codes
        if not self.causal:
            recent = w + 2 * (context - w) / context * w
            ends = (
                (context - w) / context if context > 2 * w else 0
            )  # of three blocks two see codes
            codes = self.n_codes * (1 if context > 3 * w else ends)
        attention = 2 * (self.d_shared + self.d_value) * (recent + codes)
        memory = self.ssm.flops_per_token()
        return self.unit.flops() + memory + attention + 2 * self.d_shared * self.n_codes

    def executed_flops(self, length: int) -> float:
        w, whole = self.block_size, length // self.block_size
        tail = length - whole * w
        recent, queries = whole * w**2 + tail**2 + max(0, length - w) * w, length
        if not self.causal:
            queries = -(-length // w) * w
            recent = 3 * w * queries
        attention = 2 * (self.d_shared + self.d_value) * (recent + queries * self.n_codes)
        memory = self.ssm.executed_flops(length)
        codes = 2 * length * self.d_shared * self.n_codes
        return length * self.unit.flops() + memory + attention + codes

    def no_decay_parameters(self) -> set[str]:
        table = {"bias.table"} if self.bias is not None else set()
        return {"unit.gain", "unit.offset"} | table | self.ssm_parameters()

    def ssm_parameters(self) -> set[str]:
        return {f"ssm.{name}" for name in self.ssm.undecayed}


def check_vq_options(
    n_heads: int, n_codes: int, commitment: float, decay: float, d_value: int
) -> None:
    """Raises ValueError, with the reason, for codebooks that cannot be."""
    if n_codes < 1:
        raise ValueError(f"longvq.n_codes={n_codes} must be at least 1")
    if n_heads < 1 or d_value % n_heads:
        raise ValueError(f"longvq.n_heads={n_heads} does not divide d_value={d_value}")
    if not 0 <= decay < 1:
        raise ValueError(
            f"longvq.codebook_decay={decay} must lie in [0, 1): at 1 the codebook stands still"
        )
    if commitment < 0:
        raise ValueError(f"longvq.commitment={commitment} must not be negative: it is a loss")
