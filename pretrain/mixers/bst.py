"""Block-State Transformer layer, variant SH (Pilault, Fathi et al. 2023, 2306.09539, appendix).

    s  = SSM(x)                                 over the whole sequence, one filter per channel
    S  = softmax(g QK^T + causal) V             self-attention inside a block
    Xc = softmax(g2 Q2 Kc^T + causal) Vc        Kc, Vc = s Wkc, s Wvc of the same block
    y  = [S ; Xc] Wo                            parallel, concatenated, one projection

Shapes: B batch, T time, D model width, H heads, K head width, W block size, N SSM modes.

Context states are the SSM outputs of the *same* block: token i reads outputs up to i, each of which
already summarises everything before it, so blocks do not depend on one another at all.

The paper's: the equations above, one SSM filter per channel with a dense lift to the heads (here
inside Wkc and Wvc), L2-normalised q, k, q2, kc with separate learned scales per head, no position
in the cross-attention. Ours: the SSM is diagonal (S4D-Lin, zero-order hold) where the paper has S4
(NPLR); scales start at sqrt(K) instead of 1, which starts almost uniform; rotary positions in the
self-attention by default (`position="t5"` is the paper's); the SSM reads the normed input (the
paper's text leaves it open); `self_attention="own_and_previous"` by default (open too), which makes
it comparable to a sliding window. The normalisation and the residual belong to the block around the
mixer.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.mixers.attention import check_heads, position_bias, qk_scale
from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.mixers.s4d import (
    UNDECAYED,
    DiagonalSSM,
    Init,
    check_ssm_options,
    executed_ssm_flops,
    ssm_flops,
)
from pretrain.mixers.swa import last_tokens
from pretrain.ops.normalization import prepare_heads
from pretrain.ops.window_attention import cached_keys, window_attention


class BSTState(NamedTuple):
    """With r tokens of the present block seen: k, v (B, r or W + r, H, K), as projected;
    context_k, context_v (B, r, H, K); ssm (B, D, 2, N). Bounded, and shortest at block edges."""

    position: Tensor
    phase: Tensor
    k: Tensor
    v: Tensor
    context_k: Tensor
    context_v: Tensor
    ssm: Tensor


class BlockStateTransformer(TokenMixer):
    """In-block self-attention beside cross-attention to the outputs of a state-space model.

    Args:
        d_model: model width.
        n_heads: heads of each of the two attentions.
        block_size: W; documents begin on its multiples.
        variant: "sh", the single-head way to collect context states.
        filters: "s4", kernels of a (diagonal) state-space model.
        self_attention: "own" block, or "own_and_previous".
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
        variant: Literal["sh"] = "sh",
        filters: Literal["s4"] = "s4",
        self_attention: Literal["own", "own_and_previous"] = "own_and_previous",
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
        if variant != "sh":
            raise ValueError(f"bst.variant={variant!r} is unknown: choose sh")
        if filters != "s4":
            raise ValueError(f"bst.filters={filters!r} is unknown: choose s4")
        if self_attention not in ("own", "own_and_previous"):
            raise ValueError(
                f"bst.self_attention={self_attention!r} is unknown: choose own or own_and_previous"
            )
        if chunk_size < 1 or block_size < 1 or block_size % chunk_size:
            raise ValueError(
                f"bst.chunk_size={chunk_size} does not divide block_size={block_size}: documents "
                f"begin on blocks and the SSM's chunks must end there"
            )
        self.d_model, self.n_heads, self.n_modes = d_model, n_heads, n_modes
        self.head_dim = check_heads("bst", d_model, n_heads)
        self.block_size = self.reset_grid = block_size
        self.self_attention: Literal["own", "own_and_previous"] = self_attention
        self.chunk_size, self.rotary_base = chunk_size, rotary_base
        self.position_bias = position_bias("bst", position, n_heads)
        self.ssm = DiagonalSSM(
            d_model,
            n_modes=n_modes,
            dt_min=dt_min,
            dt_max=dt_max,
            init=init,
            chunk_size=chunk_size,
        )
        self.qkv_proj = nn.Linear(d_model, 4 * d_model, bias=False)  # q, k, v and q2
        self.context_proj = nn.Linear(d_model, 2 * d_model, bias=False)  # kc and vc
        self.qk_scale = qk_scale(n_heads, self.head_dim)
        self.context_scale = qk_scale(n_heads, self.head_dim)
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)

    def forward(
        self, x: Tensor, state: BSTState | None = None, *, resets: Tensor | None = None
    ) -> MixerOutput:
        clock = self.clock(x, state, resets)
        s, ssm = self.ssm(x, None if state is None else state.ssm, clock.resets, clock.edges)
        q, k, v, q2 = self.qkv_proj(x).unflatten(-1, (4, self.n_heads, self.head_dim)).unbind(2)
        kc, vc = self.context_proj(s).unflatten(-1, (2, self.n_heads, self.head_dim)).unbind(2)
        if state is not None:
            k, v = (torch.cat([a.to(b.dtype), b], 1) for a, b in ((state.k, k), (state.v, v)))
            kc = torch.cat([state.context_k.to(kc.dtype), kc], 1)
            vc = torch.cat([state.context_v.to(vc.dtype), vc], 1)

        offset, fresh = clock.phase % self.block_size, clock.fresh_blocks(self.block_size)
        cached, base = k.shape[1] - q.shape[1], self.rotary_base
        bias = None
        if self.position_bias is not None:
            bias = self.position_bias(torch.arange(2 * self.block_size, device=x.device))
        starts = (cached, 0) if bias is None else (None, None)
        own = window_attention(
            prepare_heads(q, normalize=True, scale=self.qk_scale, start=starts[0], base=base),
            prepare_heads(k, normalize=True, start=starts[1], base=base),
            v,
            block_size=self.block_size,
            reach=self.self_attention,
            offset=offset,
            fresh=fresh,
            scale=1.0,
            bias=bias,
        )
        context = window_attention(
            prepare_heads(q2, normalize=True, scale=self.context_scale),
            prepare_heads(kc, normalize=True),
            vc,
            block_size=self.block_size,
            reach="own",
            offset=offset,
            scale=1.0,
        )
        y = self.out_proj(torch.cat([own, context], 2).flatten(2))

        offset = (offset + clock.length) % self.block_size
        keep = cached_keys(self.self_attention, self.block_size, offset)
        position, phase = clock.after(x)
        state = BSTState(
            position,
            phase,
            last_tokens(k, keep),
            last_tokens(v, keep),
            last_tokens(kc, offset),
            last_tokens(vc, offset),
            ssm,
        )
        return MixerOutput(y, state, aux={})

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> BSTState:
        keep = cached_keys(self.self_attention, self.block_size, 0)
        heads = (self.n_heads, self.head_dim)
        cache = torch.zeros(batch_size, keep, *heads, device=device, dtype=dtype)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return BSTState(
            position,
            cache.new_empty(batch_size, 0, 0),
            cache,
            cache,
            cache[:, :0],
            cache[:, :0],
            self.ssm.init_state(batch_size, device=device, dtype=dtype),
        )

    def flops_per_token(self, context: int) -> float:
        w = min(self.block_size, context)
        # Whole blocks are assumed: (w + 1) / 2 keys of the own block, all but the first see w more.
        own = (w + 1) / 2
        previous = (context - w) / context * w if self.self_attention != "own" else 0
        attention = 4 * self.d_model * (2 * own + previous)
        return (
            16 * self.d_model**2
            + attention
            + ssm_flops(self.d_model, self.n_modes, self.chunk_size)
        )

    def executed_flops(self, length: int) -> float:
        w, whole = self.block_size, length // self.block_size
        tail = length - whole * w
        scores = 2 * (whole * w**2 + tail**2)
        if self.self_attention != "own":
            scores += max(0, length - w) * w
        return (
            16 * length * self.d_model**2
            + 4 * self.d_model * scores
            + executed_ssm_flops(self.d_model, self.n_modes, self.chunk_size, length)
        )

    def no_decay_parameters(self) -> set[str]:
        bias = set() if self.position_bias is None else {"position_bias.table"}
        return bias | self.ssm_parameters()

    def ssm_parameters(self) -> set[str]:
        return {f"ssm.{name}" for name in UNDECAYED}
