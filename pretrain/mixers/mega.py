"""MEGA: moving-average equipped gated attention (Ma et al. 2022, 2209.10655), and MEGA-chunk.

    m = silu(EMA(x))                                      multi-dimensional damped EMA
    z = silu(m Wz);  q, k = g_q z + b_q, g_k z + b_k;  v = silu(x Wv)
    r = silu(m Wr);  u = sigmoid(m Wu);  o = attention(q, k, v)
    y = silu(m Wp + (r o) Wh),  written to the stream as x + u (y - x)

Shapes: B batch, T time, D model width, S shared width (of q and k), E value width, N EMA modes.

One head is enough because the gates multiply every channel of its output. v comes from x and not
from the EMA; in MEGA-chunk the EMA alone carries anything across chunks.

The paper's (its released code): the equations, one head, N = 16, all initial values, softmax or
Laplace weights, chunks without overlap, the rotary bias. Ours: the bias may be T5's instead; the
EMA's initial memories may be longer; in a causal model Laplace scores are divided by the number of
visible keys; chunks are counted from the start of the document. The gate multiplies the difference
to the *unnormed* stream, in the block.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.mixers.attention import document_starts
from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.ops.biased_attention import Weighting, chunk_attention, full_attention
from pretrain.ops.damped_ema import EMAParameters, coefficients, damped_ema
from pretrain.ops.numerics import matmul_dtype
from pretrain.ops.qkv_heads import last_tokens
from pretrain.ops.relative_bias import RotaryBias, T5Bias

RELEASED_MEMORY = 4.0  # tokens, 1 / (1 - q) at delta = alpha = 0


class DampedEMA(nn.Module):
    """Parameters of the multi-dimensional damped EMA, initialised as in the released code.

    That code starts every mode at a memory 1 / (1 - q) of four tokens, and what is forgotten before
    it counts has no gradient to be kept: tokens further back than some tens are never learned.

    Args:
        d_model: channels.
        n_modes: N, real modes per channel.
        chunk_size: tokens per chunk of the Toeplitz form; speed only.
        longest_memory: tokens; initial memories of a channel's modes are spread geometrically from
            the released four to this.
    """

    def __init__(
        self,
        d_model: int,
        n_modes: int,
        chunk_size: int,
        longest_memory: float = RELEASED_MEMORY,
    ) -> None:
        super().__init__()
        self.d_model, self.n_modes, self.chunk_size = d_model, n_modes, chunk_size
        self.delta = nn.Parameter(0.2 * torch.randn(d_model, n_modes))
        # Released: alpha ~ N(0, 0.2), sigmoid(delta) near 1/2; the memory is 2 / sigmoid(alpha).
        spread = torch.linspace(0, 1, n_modes)
        memory = RELEASED_MEMORY * (longest_memory / RELEASED_MEMORY) ** spread
        self.alpha = nn.Parameter((2 / memory).logit() + 0.2 * torch.randn(d_model, n_modes))
        signs = torch.ones(n_modes)
        signs[1::2] = -1
        self.beta = nn.Parameter(signs + 0.02 * torch.randn(d_model, n_modes))
        self.gamma = nn.Parameter(torch.randn(d_model, n_modes))
        self.omega = nn.Parameter(torch.randn(d_model))

    def forward(
        self, u: Tensor, state: Tensor | None, resets: Tensor | None, edges: range
    ) -> tuple[Tensor, Tensor]:
        """u (B, T, D), state (B, D, N) -> y like u, state after; see `damped_ema`."""
        parameters = EMAParameters(self.delta, self.alpha, self.beta, self.gamma, self.omega)
        return damped_ema(
            u.to(matmul_dtype(u)),
            parameters,
            state,
            resets=resets,
            edges=edges,
            chunk_size=self.chunk_size,
        )

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, D, N) zeros, in at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        return torch.zeros(batch_size, self.d_model, self.n_modes, device=device, dtype=wide)

    def flops(self) -> float:
        """Per token: the useful half of the Toeplitz product, and in and out of the states."""
        return self.d_model * (self.chunk_size + 4 * self.n_modes)

    def executed_flops(self, length: int) -> float:
        """For one sequence, with both halves of the Toeplitz product."""
        tail = length % self.chunk_size
        toeplitz = (length - tail) * 2 * self.chunk_size + 2 * tail**2
        return self.d_model * (toeplitz + length * 4 * self.n_modes)

    @torch.no_grad()
    def health(self) -> dict[str, Tensor]:
        """See `TokenMixer.health`; there are no step sizes."""
        parameters = EMAParameters(self.delta, self.alpha, self.beta, self.gamma, self.omega)
        log_q, _, _ = coefficients(parameters, torch.float64)
        return {"memory_horizon": -1 / log_q}


# Decay rates and what multiplies them: no weight decay, the state-space learning rate.
EMA_PARAMETERS = ("delta", "alpha", "beta", "gamma", "omega")


class GatedParts(NamedTuple):
    """q, k: (B, T, S). v, r: (B, T, E). p, u: (B, T, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    r: Tensor
    p: Tensor
    u: Tensor


class GatedUnit(nn.Module):
    """The projections around a gated attention; the attention itself is its owner's.

    Args:
        d_model: D.
        d_shared: S.
        d_value: E.
    """

    def __init__(self, d_model: int, d_shared: int, d_value: int) -> None:
        super().__init__()
        self.widths = (d_shared, d_value, d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_value)
        self.m_proj = nn.Linear(d_model, sum(self.widths))
        self.gain = nn.Parameter(0.02 * torch.randn(2, d_shared))
        self.offset = nn.Parameter(torch.zeros(2, d_shared))
        # Not called out_proj: what it writes passes a silu and a gate, depth does not add it up.
        self.h_proj = nn.Linear(d_value, d_model, bias=False)

    def forward(self, x: Tensor, m: Tensor) -> GatedParts:
        """x (B, T, D), and the EMA's output m (B, T, D)."""
        # Filters return m channel by channel, of which torch makes a product and adds the bias in a
        # pass of its own.
        z, r, p, u = self.m_proj(m.contiguous()).split(self.widths, -1)
        q, k = (F.silu(z).unsqueeze(2) * self.gain + self.offset).unbind(2)
        return GatedParts(q, k, F.silu(self.v_proj(x)), F.silu(r), p, u.sigmoid())

    def finish(self, parts: GatedParts, o: Tensor) -> Tensor:
        """silu(p + (r o) Wh) of the attention's output o (B, T, E)."""
        return F.silu(parts.p + self.h_proj(parts.r * o))

    def flops(self) -> float:
        """Per token."""
        d_value, d_model = self.widths[1:3]
        return 2 * d_model * (2 * d_value + sum(self.widths))


class MegaState(NamedTuple):
    """ssm: (B, D, N), the EMA's; k (B, r, 1, S), v (B, r, 1, E): the r tokens of the present chunk,
    or, without chunks, all tokens."""

    position: Tensor
    phase: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


class Mega(TokenMixer):
    """Gated single-head attention over queries and keys that have passed an EMA.

    Args:
        d_model: model width.
        chunk_size: tokens of an attention chunk (MEGA-chunk), where documents begin; 0: attention
            over the whole document, with a state that grows.
        d_shared: S, width of queries and keys; 0: a quarter of the model width.
        d_value: E; 0: twice the model width.
        n_modes: N.
        weighting: "softmax" or "laplace".
        bias: "rotary" or "t5".
        ema_chunk_size: tokens per chunk of the EMA; divides `chunk_size`.
        longest_memory: longest initial memory of the EMA in tokens, see `DampedEMA`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        chunk_size: int = 512,
        d_shared: int = 0,
        d_value: int = 0,
        n_modes: int = 16,
        weighting: Weighting = "softmax",
        bias: Literal["rotary", "t5"] = "rotary",
        ema_chunk_size: int = 64,
        longest_memory: float = RELEASED_MEMORY,
    ) -> None:
        super().__init__()
        check_gated_options("mega", d_model, d_shared, d_value, n_modes)
        check_longest_memory("mega", longest_memory)
        if weighting not in ("softmax", "laplace"):
            raise ValueError(f"mega.weighting={weighting!r} is unknown: choose softmax or laplace")
        if bias not in ("rotary", "t5"):
            raise ValueError(f"mega.bias={bias!r} is unknown: choose rotary or t5")
        if chunk_size < 0 or ema_chunk_size < 1 or chunk_size % ema_chunk_size:
            raise ValueError(
                f"mega.ema_chunk_size={ema_chunk_size} does not divide chunk_size={chunk_size}: "
                f"documents begin on chunks and the EMA's chunks must end there"
            )
        self.d_model, self.chunk_size = d_model, chunk_size
        self.d_shared, self.d_value = d_shared or d_model // 4, d_value or 2 * d_model
        self.weighting: Weighting = weighting
        self.block_size = self.reset_grid = chunk_size or ema_chunk_size
        self.constant_state = chunk_size > 0
        self.ema = DampedEMA(d_model, n_modes, ema_chunk_size, longest_memory)
        self.unit = GatedUnit(d_model, self.d_shared, self.d_value)
        self.bias = RotaryBias(1, self.d_shared) if bias == "rotary" else T5Bias(1)

    def forward(
        self, x: Tensor, state: MegaState | None = None, *, resets: Tensor | None = None
    ) -> MixerOutput:
        clock = self.clock(x, state, resets)
        m, ssm = self.ema(x, None if state is None else state.ssm, clock.resets, clock.edges)
        parts = self.unit(x, F.silu(m))
        k, v = parts.k.unsqueeze(2), parts.v.unsqueeze(2)
        if state is not None:
            k, v = (torch.cat([a.to(b.dtype), b], 1) for a, b in ((state.k, k), (state.v, v)))
        q = parts.q.unsqueeze(2)
        if self.chunk_size:
            offset = clock.phase % self.chunk_size
            bias = self.bias(torch.arange(self.chunk_size, device=x.device))
            o = chunk_attention(
                q,
                k,
                v,
                bias,
                chunk_size=self.chunk_size,
                offset=offset,
                weighting=self.weighting,
            )
            keep = (offset + clock.length) % self.chunk_size
            # Inductor makes a view of an empty copy, which keeps all keys and values alive.
            k, v = (
                last_tokens(c, keep) if keep else c.new_empty(x.shape[0], 0, *c.shape[2:])
                for c in (k, v)
            )
        else:
            bias = self.bias(torch.arange(k.shape[1], device=x.device))
            starts = document_starts(clock, k.shape[1] - clock.length)
            o = full_attention(q, k, v, bias, starts, self.weighting)
        y = self.unit.finish(parts, o.flatten(2))
        return MixerOutput(y, MegaState(*clock.after(x), ssm, k, v), aux={}, gate=parts.u)

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> MegaState:
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        empty = torch.zeros(batch_size, 0, 1, self.d_shared, device=device, dtype=dtype)
        return MegaState(
            position,
            empty.new_empty(batch_size, 0, 0),
            self.ema.init_state(batch_size, device=device, dtype=dtype),
            empty,
            empty.new_empty(batch_size, 0, 1, self.d_value),
        )

    def flops_per_token(self, context: int) -> float:
        # Whole chunks are assumed.
        visible = (min(self.chunk_size or context, context) + 1) / 2
        attention = 2 * (self.d_shared + self.d_value) * visible
        return self.unit.flops() + self.ema.flops() + attention

    def executed_flops(self, length: int) -> float:
        tail = length % self.chunk_size if self.chunk_size else length
        scores = (length - tail) * self.chunk_size + tail**2
        attention = 2 * (self.d_shared + self.d_value) * scores
        return length * self.unit.flops() + self.ema.executed_flops(length) + attention

    def no_decay_parameters(self) -> set[str]:
        bias = {f"bias.{name}" for name, _ in self.bias.named_parameters()}
        return {"unit.gain", "unit.offset"} | bias | self.ssm_parameters()

    def ssm_parameters(self) -> set[str]:
        return {f"ema.{name}" for name in EMA_PARAMETERS}

    def health(self) -> dict[str, Tensor]:
        return self.ema.health()


def check_gated_options(
    mixer: str, d_model: int, d_shared: int, d_value: int, n_modes: int
) -> None:
    """Raises ValueError, with the reason, for sizes that no gated unit can have."""
    for key, value in (("d_shared", d_shared), ("d_value", d_value)):
        if value < 0:
            raise ValueError(f"{mixer}.{key}={value} must be positive, or 0 for its default")
    if (d_shared or d_model // 4) % 2 or not (d_shared or d_model // 4):
        raise ValueError(
            f"{mixer}.d_shared={d_shared or d_model // 4} must be even: rotary positions turn pairs"
        )
    if n_modes < 1:
        raise ValueError(f"{mixer}.n_modes={n_modes} must be at least 1")


def check_longest_memory(mixer: str, longest_memory: float) -> None:
    """Raises ValueError for a memory shorter than the one it is spread from."""
    if longest_memory < RELEASED_MEMORY:
        raise ValueError(
            f"{mixer}.longest_memory={longest_memory} must be at least {RELEASED_MEMORY} tokens, "
            f"the released initialisation's"
        )
