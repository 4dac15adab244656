"""SPADE's global layer: a state-space model beside local attention (Zuo et al. 2022, 2212.08136).

    g = SSM(x)                                  global, bare: no activation, no projection
    a = LocalAttn(x)                            parallel to it: the same input
    y = W [norm_g(g) ; norm_a(a)] + b           concat, the published choice
    y = (norm_g(g) + norm_a(a)) / 2             add
    y = LocalAttn(SSM(x))                       stack

Shapes: B batch, T time, D model width, H heads, K head width, W window size, N SSM modes.

Only the bottom layer of a SPADE model is this one, `layers: {default: swa, at: {0: spade}}`; all
others are local attention. Without its two norms the SSM's output, a sum over all of the past,
would drown the attention's.

Known from the released code: the equations, the order in W, the bare SSM, `add` with constant
weights, windows of the last W tokens and symmetric ones in encoders; the name of the `chunk`
variant (attention inside of non-overlapping chunks) is the paper's. The released SSM is S4 with
LegS and 32 pairs of modes, `ssm="s4"`; the default here is the diagonal S4D-LegS, which is cheaper.
Ours: RMS norms (the released decoder has LayerNorm, its encoder RMS), no dropout in here (see
`model.dropout`), rotary positions by default (`position="t5"` is theirs; their encoder has a table
per layer), one learning rate for all of A, B and dt (theirs: dt at the model's).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.mixers.attention import check_heads, position_bias, qk_scale
from pretrain.mixers.base import Clock, MixerOutput, TokenMixer
from pretrain.mixers.s4 import NPLRSSM
from pretrain.mixers.s4d import DiagonalSSM, Init, check_ssm_options
from pretrain.mixers.ssm_layer import StateSpaceModel
from pretrain.ops.normalization import rms_norm
from pretrain.ops.qkv_heads import prepare_qkv
from pretrain.ops.symmetric_window_attention import symmetric_window_attention
from pretrain.ops.window_attention import Reach, cached_keys, window_attention


class SpadeState(NamedTuple):
    """k, v: (B, W, H, K), or (B, r, H, K) for chunks with r tokens of the present one seen, as
    projected; ssm: (B, D, 2, N), or (B, 0) without an SSM."""

    position: Tensor
    phase: Tensor
    k: Tensor
    v: Tensor
    ssm: Tensor


class Spade(TokenMixer):
    """A state-space model parallel to local attention.

    Args:
        d_model: model width.
        causal: False for encoders: a two-sided SSM, and a window on both sides.
        n_heads: attention heads.
        window_size: visible tokens, or tokens per chunk; documents begin on its multiples.
        attention: "window", the last `window_size` tokens, or "chunk", the own chunk's.
        ssm: "s4d", "s4", or "none": the control that has to be worse.
        combine: "concat", "add" or "stack".
        n_modes: complex SSM modes per channel (the paper's N = 64 is 32).
        dt_min: smallest initial SSM step size.
        dt_max: largest initial SSM step size.
        init: initial spectrum of "s4d", see `DiagonalSSM`; "s4" has "legs" only.
        chunk_size: tokens per SSM chunk, a divisor of `window_size`; speed only.
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
        attention: Literal["window", "chunk"] = "window",
        ssm: Literal["s4d", "s4", "none"] = "s4d",
        combine: Literal["concat", "add", "stack"] = "concat",
        n_modes: int = 32,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        init: Init = "legs",
        chunk_size: int = 64,
        qk_norm: bool = False,
        position: Literal["rotary", "t5"] = "rotary",
        rotary_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        check_ssm_options("spade", n_modes, dt_min, dt_max, init)
        _check_choices(attention, ssm, combine, init)
        if not causal and attention != "window":
            raise ValueError(
                f"spade.attention={attention!r} with causal=False: chunks are counted from the "
                f"first place of a lane, so pads in front would move them; choose window"
            )
        if chunk_size < 1 or window_size < 1 or window_size % chunk_size:
            raise ValueError(
                f"spade.chunk_size={chunk_size} does not divide window_size={window_size}: "
                f"documents begin on its multiples and the SSM's chunks must end there"
            )
        self.d_model, self.n_heads, self.window_size = d_model, n_heads, window_size
        self.causal = causal
        self.head_dim = check_heads("spade", d_model, n_heads)
        self.block_size = self.reset_grid = window_size
        self.reach: Reach = "window" if attention == "window" else "own"
        self.combine, self.rotary_base = combine, rotary_base
        self.position_bias = position_bias("spade", position, n_heads, causal=causal)
        self.ssm: StateSpaceModel | None = None
        if ssm == "s4":
            self.ssm = NPLRSSM(
                d_model,
                n_modes=n_modes,
                dt_min=dt_min,
                dt_max=dt_max,
                chunk_size=chunk_size,
                causal=causal,
            )
        elif ssm == "s4d":
            self.ssm = DiagonalSSM(
                d_model,
                n_modes=n_modes,
                dt_min=dt_min,
                dt_max=dt_max,
                init=init,
                chunk_size=chunk_size,
                causal=causal,
            )
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.qk_scale = qk_scale(n_heads, self.head_dim) if qk_norm else None
        if combine == "stack":
            self.out_proj = nn.Linear(d_model, d_model, bias=False)
            return
        # Its output is normed, so it is no projection onto the residual stream.
        self.heads_proj = nn.Linear(d_model, d_model, bias=False)
        self.attention_norm = nn.Parameter(torch.ones(d_model))
        if ssm != "none":
            self.ssm_norm = nn.Parameter(torch.ones(d_model))
        if combine == "concat":
            self.out_proj = nn.Linear(d_model * (1 if ssm == "none" else 2), d_model)

    def forward(
        self,
        x: Tensor,
        state: SpadeState | None = None,
        *,
        resets: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> MixerOutput:
        self.check_sides(state, resets, padding)
        clock = self.clock(x, state, resets)
        if padding is not None:  # the SSM has no mask
            x = x.masked_fill(padding.unsqueeze(-1), 0)
        g, ssm = self._global(x, state, clock)
        source = g if self.combine == "stack" else x
        keep = 0
        if self.causal:
            offset = (clock.phase + clock.length) % self.window_size
            keep = cached_keys(self.reach, self.window_size, offset)
        qkv = prepare_qkv(
            self.qkv_proj(source).unflatten(-1, (3, self.n_heads, self.head_dim)),
            None if state is None else (state.k, state.v),
            scale=self.qk_scale,
            base=self.rotary_base if self.position_bias is None else None,
            keep=keep,
        )
        heads = self._attend(qkv.q, qkv.k, qkv.v, clock, padding).flatten(2)

        if self.combine == "stack":
            y = self.out_proj(heads)
        else:
            a = rms_norm(self.heads_proj(heads), self.attention_norm)
            g = a[..., :0] if self.ssm is None else rms_norm(g, self.ssm_norm)
            y = self.out_proj(torch.cat([g, a], -1)) if self.combine == "concat" else (g + a) / 2

        if not self.causal:
            return MixerOutput(y, None, aux={})
        return MixerOutput(y, SpadeState(*clock.after(x), *qkv.kept, ssm), aux={})

    def _global(self, x: Tensor, state: SpadeState | None, clock: Clock) -> tuple[Tensor, Tensor]:
        """SSM(x) (B, T, D) and the SSM's state after it."""
        if self.ssm is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            return x, x.new_empty(x.shape[0], 0, dtype=wide)
        return self.ssm(x, None if state is None else state.ssm, clock.resets, clock.edges)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, clock: Clock, padding: Tensor | None
    ) -> Tensor:
        """Prepared q (B, T, H, K), k and v with the cache in front -> (B, T, H, K)."""
        bias, w = None, self.window_size
        if self.position_bias is not None:
            bias = self.position_bias(torch.arange(0 if self.causal else 1 - w, w, device=q.device))
        scale = 1.0 if self.qk_scale is not None else None
        if not self.causal:
            return symmetric_window_attention(
                q, k, v, window_size=w, padding=padding, scale=scale, bias=bias
            )
        return window_attention(
            q,
            k,
            v,
            block_size=w,
            reach=self.reach,
            offset=clock.phase % w,
            fresh=clock.fresh_blocks(w),
            scale=scale,
            bias=bias,
        )

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> SpadeState:
        keep = cached_keys(self.reach, self.window_size, 0)
        heads = (self.n_heads, self.head_dim)
        cache = torch.zeros(batch_size, keep, *heads, device=device, dtype=dtype)
        if self.ssm is None:
            wide = torch.promote_types(dtype, torch.float32)
            ssm = torch.empty(batch_size, 0, device=device, dtype=wide)
        else:
            ssm = self.ssm.init_state(batch_size, device=device, dtype=dtype)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return SpadeState(position, cache.new_empty(batch_size, 0, 0), cache, cache, ssm)

    def flops_per_token(self, context: int) -> float:
        w = min(self.window_size, context)
        # For chunks whole ones are assumed.
        visible = w - w * (w - 1) / (2 * context) if self.reach == "window" else (w + 1) / 2
        if not self.causal:
            visible = 2 * visible - 1
        ssm = 0 if self.ssm is None else self.ssm.flops_per_token()
        return self._projections() + 4 * self.d_model * visible + ssm

    def executed_flops(self, length: int) -> float:
        w, tail = self.window_size, length % self.window_size
        if not self.causal:
            scores = -(-length // w) * 3 * w**2
        elif self.reach == "window":
            scores = min(length, w) ** 2 + max(0, length - w) * 2 * w
        else:
            scores = (length - tail) * w + tail**2
        ssm = 0 if self.ssm is None else self.ssm.executed_flops(length)
        return length * self._projections() + 4 * self.d_model * scores + ssm

    def _projections(self) -> float:
        """FLOPs per token of q, k, v, the heads' output and, for concat, W."""
        joined = self.out_proj.in_features if self.combine == "concat" else 0
        return 8 * self.d_model**2 + 2 * joined * self.d_model

    def no_decay_parameters(self) -> set[str]:
        bias = set() if self.position_bias is None else {"position_bias.table"}
        return bias | self.ssm_parameters()

    def ssm_parameters(self) -> set[str]:
        return set() if self.ssm is None else {f"ssm.{name}" for name in self.ssm.undecayed}

    def health(self) -> dict[str, Tensor]:
        return {} if self.ssm is None else self.ssm.health()


def _check_choices(attention: str, ssm: str, combine: str, init: str) -> None:
    for key, value, choices in (
        ("attention", attention, ("window", "chunk")),
        ("ssm", ssm, ("s4d", "s4", "none")),
        ("combine", combine, ("concat", "add", "stack")),
    ):
        if value not in choices:
            raise ValueError(f"spade.{key}={value!r} is unknown: choose {', '.join(choices)}")
    if ssm == "s4" and init != "legs":
        raise ValueError(f"spade.init={init!r}: ssm=s4 starts as HiPPO-LegS, choose legs or s4d")
    if ssm == "none" and combine != "concat":
        raise ValueError(
            f"spade.combine={combine!r} has nothing to combine with ssm=none: choose concat, or "
            f"the mixer swa"
        )
