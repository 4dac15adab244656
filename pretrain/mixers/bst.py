"""Block-State Transformer layer (Pilault, Fathi et al. 2023, 2306.09539, appendix).

    S  = softmax(g QK^T + causal) V             self-attention inside a block
    Xc = softmax(g2 Q2 Kc^T + mask) Vc          Kc, Vc = c Wkc, c Wvc, the block's context states c
    y  = [S ; Xc] Wo                            parallel, concatenated, one projection

Context states come from filters (a state-space model) over the whole sequence, in three ways:

    SH  s = SSM(x), one filter per channel;  c = s of the same block; causal
    MH  one bank of filters per head, from which that head alone reads; else like SH
    MF  S filters per channel; c = their last outputs of the previous block + a learned id per
        filter; block 0 reads a learned c; no mask

Shapes: B batch, T time, D model width, H heads, K head width, W block size, N SSM modes, S filters.

In SH and MH token i reads outputs up to i of its own block, each of which already summarises all
before it, so blocks do not depend on one another at all. In MF the shift is along blocks: one along
the states, as the printed pseudo-code has it, would show a block its own end.

The paper's: the above, L2-normalised q, k, q2, kc with separate learned scales per head, no
position in the cross-attention, a dense lift from one filter to the heads (here in Wkc and Wvc).
Ours: the SSM is diagonal (S4D-Lin, zero-order hold) where the paper has S4 (NPLR); MF's filters
share a channel's dynamics and differ in C and D, as the `channels` of S4's code do (2N real states
span at most 2N filters); scales start at sqrt(K) instead of 1, which starts almost uniform; rotary
positions in the self-attention by default (`position="t5"` is the paper's); the filters read the
normed input (the paper's text leaves it open); `self_attention="own_and_previous"` by default (open
too), which makes it comparable to a sliding window; the shape of the unstructured filters' network.
The normalisation and the residual belong to the block around the mixer.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.mixers.attention import check_heads, position_bias, qk_scale
from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.mixers.bst_context import (
    BlockEndSSM,
    BSTState,
    MultiFilterState,
    PreviousBlockContext,
    SameBlockContext,
)
from pretrain.mixers.s4d import DiagonalSSM, Init, check_ssm_options
from pretrain.mixers.unstructured_filters import UnstructuredFilters
from pretrain.ops.qkv_heads import prepare_qkv
from pretrain.ops.window_attention import cached_keys, window_attention


class NoState(NamedTuple):
    """Unstructured filters have nothing of constant size to carry."""

    position: Tensor
    phase: Tensor


class BlockStateTransformer(TokenMixer):
    """In-block self-attention beside cross-attention to the outputs of a state-space model.

    Args:
        d_model: model width.
        n_heads: heads of each of the two attentions.
        block_size: W; documents begin on its multiples.
        variant: "sh", "mh" or "mf", how context states are collected.
        filters: "s4", kernels of a (diagonal) state-space model, or "unstructured", which are tied
            to a training length and carry no state.
        self_attention: "own" block, or "own_and_previous".
        n_filters: S, filters per channel of variant "mf".
        train_length: longest segment of unstructured filters.
        n_modes: complex SSM modes per channel.
        dt_min: smallest initial SSM step size.
        dt_max: largest initial SSM step size.
        init: initial SSM spectrum, see `DiagonalSSM`.
        chunk_size: tokens per SSM chunk, a divisor of `block_size`; speed only.
        position: of the self-attention: "rotary", or "t5" for T5's bias by bucket of distance.
        rotary_base: base of the rotary wavelengths.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 8,
        block_size: int = 512,
        variant: Literal["sh", "mh", "mf"] = "sh",
        filters: Literal["s4", "unstructured"] = "s4",
        self_attention: Literal["own", "own_and_previous"] = "own_and_previous",
        n_filters: int = 32,
        train_length: int = 4096,
        n_modes: int = 16,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        init: Init = "lin",
        chunk_size: int = 64,
        position: Literal["rotary", "t5"] = "rotary",
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        check_ssm_options("bst", n_modes, dt_min, dt_max, init)
        if variant not in ("sh", "mh", "mf"):
            raise ValueError(f"bst.variant={variant!r} is unknown: choose sh, mh or mf")
        if filters not in ("s4", "unstructured"):
            raise ValueError(f"bst.filters={filters!r} is unknown: choose s4 or unstructured")
        if n_filters < 1:
            raise ValueError(f"bst.n_filters={n_filters} must be at least 1")
        if train_length < 2:
            raise ValueError(f"bst.train_length={train_length} must be at least 2 tokens")
        if self_attention not in ("own", "own_and_previous"):
            raise ValueError(
                f"bst.self_attention={self_attention!r} is unknown: choose own or own_and_previous"
            )
        if chunk_size < 1 or block_size < 1 or block_size % chunk_size:
            raise ValueError(
                f"bst.chunk_size={chunk_size} does not divide block_size={block_size}: documents "
                f"begin on blocks and the SSM's chunks must end there"
            )
        self.d_model, self.n_heads = d_model, n_heads
        self.head_dim = check_heads("bst", d_model, n_heads)
        self.block_size = self.reset_grid = block_size
        self.self_attention: Literal["own", "own_and_previous"] = self_attention
        self.rotary_base = rotary_base
        self.position_bias = position_bias("bst", position, n_heads)
        self.constant_state = filters == "s4"
        self.longest_segment = 0 if filters == "s4" else train_length

        ssm: dict[str, Any] = {
            "n_modes": n_modes,
            "dt_min": dt_min,
            "dt_max": dt_max,
            "init": init,
            "chunk_size": chunk_size,
        }
        self.context: SameBlockContext | PreviousBlockContext
        bank: DiagonalSSM | UnstructuredFilters
        if variant == "mf":
            ends: dict[str, int] = {"n_filters": n_filters, "block_size": block_size}
            if filters == "s4":
                bank = BlockEndSSM(d_model, **ends, **ssm)
            else:
                bank = UnstructuredFilters(d_model, train_length=train_length, **ends)
            self.context = PreviousBlockContext(d_model, n_heads, bank, **ends)
        else:
            n_banks = n_heads if variant == "mh" else 1
            if filters == "s4":
                bank = DiagonalSSM(n_banks * d_model, **ssm)
            else:
                bank = UnstructuredFilters(n_banks * d_model, train_length=train_length)
            self.context = SameBlockContext(
                d_model, n_heads, bank, n_banks=n_banks, block_size=block_size
            )
        self.qkv_proj = nn.Linear(d_model, 4 * d_model, bias=False)  # q, k, v and q2
        self.qk_scale = qk_scale(n_heads, self.head_dim)
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)

    def forward(self, x: Tensor, state: Any = None, *, resets: Tensor | None = None) -> MixerOutput:
        if state is not None and not self.constant_state:
            self._refuse_state()
        clock = self.clock(x, state, resets)
        keep = 0
        if self.constant_state:
            seen = (clock.phase + clock.length) % self.block_size
            keep = cached_keys(self.self_attention, self.block_size, seen)
        heads = prepare_qkv(
            self.qkv_proj(x).unflatten(-1, (4, self.n_heads, self.head_dim)),
            None if state is None else (state.k, state.v),
            scale=self.qk_scale,
            base=self.rotary_base if self.position_bias is None else None,
            keep=keep,
        )
        (q2,) = heads.others
        context, tail = self.context(q2, x, clock, state)
        bias = None
        if self.position_bias is not None:
            bias = self.position_bias(torch.arange(2 * self.block_size, device=x.device))
        own = window_attention(
            heads.q,
            heads.k,
            heads.v,
            block_size=self.block_size,
            reach=self.self_attention,
            offset=clock.phase % self.block_size,
            fresh=clock.fresh_blocks(self.block_size),
            scale=1.0,
            bias=bias,
        )
        y = self.out_proj(torch.cat([own, context], 2).flatten(2))
        if not self.constant_state:
            return MixerOutput(y, NoState(*clock.after(x)), aux={})
        return MixerOutput(y, self._state_type()(*clock.after(x), *heads.kept, *tail), aux={})

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        if not self.constant_state:
            self._refuse_state()
        keep = cached_keys(self.self_attention, self.block_size, 0)
        heads = (self.n_heads, self.head_dim)
        cache = torch.zeros(batch_size, keep, *heads, device=device, dtype=dtype)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        tail = self.context.init_state(batch_size, device=device, dtype=dtype)
        return self._state_type()(position, cache.new_empty(batch_size, 0, 0), cache, cache, *tail)

    def _state_type(self) -> Any:
        return BSTState if isinstance(self.context, SameBlockContext) else MultiFilterState

    def _refuse_state(self) -> None:
        raise ValueError(
            "bst.filters=unstructured carries no state from segment to segment, because its "
            "filters have no recurrence: use train.carry_state=false, or filters=s4"
        )

    def flops_per_token(self, context: int) -> float:
        w = min(self.block_size, context)
        # Whole blocks are assumed: (w + 1) / 2 keys of the own block, all but the first see w more.
        visible = (w + 1) / 2
        if self.self_attention != "own":
            visible += (context - w) / context * w
        attention = 12 * self.d_model**2 + 4 * self.d_model * visible
        return (
            attention
            + self.context.flops_per_token(context)
            + self.context.filters.flops_per_token()
        )

    def executed_flops(self, length: int) -> float:
        w, whole = self.block_size, length // self.block_size
        scores = whole * w**2 + (length - whole * w) ** 2
        if self.self_attention != "own":
            scores += max(0, length - w) * w
        attention = 12 * length * self.d_model**2 + 4 * self.d_model * scores
        return (
            attention
            + self.context.executed_flops(length)
            + self.context.filters.executed_flops(length)
        )

    def no_decay_parameters(self) -> set[str]:
        bias = set() if self.position_bias is None else {"position_bias.table"}
        context = {f"context.{name}" for name in self.context.undecayed()}
        return bias | context | self.ssm_parameters()

    def ssm_parameters(self) -> set[str]:
        return {f"context.filters.{name}" for name in self.context.filters.undecayed}

    def health(self) -> dict[str, Tensor]:
        return self.context.filters.health()
