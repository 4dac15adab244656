"""Mamba-2: a selective state space with one decay per head (Dao & Gu 2024, 2405.21060).

    z, xbc, dt = x W_in                     [x' ; b ; c] = silu(conv(xbc)), a few taps per channel
    dt = softplus(dt + dt_bias)             S_t = exp(-dt exp(A_log)) S_{t-1} + dt x'_t b_t^T
    y  = RMSNorm((S c + D x') silu(z)) W_out

Shapes: B batch, T time, D model width, I = expand D inner width, H heads of width P, G groups
(heads of one group share b and c), N state size, K taps.

Decays and what is written and read depend on the input, so nothing here is a convolution but the
K taps; SSD turns it into matmuls all the same (pretrain/ops/ssd.py).

The paper's (and its released code's): all of the above, the names and shapes of the parameters, A
in [1, 16], D = 1, dt log-uniform in [1e-3, 1e-1]; weights of transformers' `Mamba2Mixer` load as
they are. Ours: the block around it, whose MLP a published Mamba-2 does not have.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.ops.gated_norm import GatedNorm, gated_norm_linear
from pretrain.ops.numerics import no_autocast, wide_dtype
from pretrain.ops.short_convolution import short_convolution
from pretrain.ops.ssd import ssd


class InProjection(nn.Linear):
    """(..., D) -> z (..., I), and xbc and dt, (..., out_features - I).

    Two products: on a CPU the backward keeps z, but of the rest a copy that the convolution makes,
    and z as a part of one tensor would keep both.
    """

    def __init__(self, d_model: int, d_inner: int, out_features: int) -> None:
        super().__init__(d_model, out_features, bias=False)
        self.d_inner = d_inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, rest = self.weight.split([self.d_inner, self.out_features - self.d_inner])
        return F.linear(x, gate), F.linear(x, rest)


class ShortConvolution(nn.Module):
    """The taps, in the layout of `nn.Conv1d`, and its initialisation."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        bound = taps**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(
        self, x: Tensor, state: Tensor | None, resets: Tensor | None, edges: range
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, channels), state (B, K - 1, channels); see `short_convolution`."""
        return short_convolution(
            x, self.weight.squeeze(1), self.bias, state, resets=resets, edges=edges
        )


class GatedRMSNorm(nn.Module):
    """weight * RMSNorm(y silu(z)), normalised within each of `groups` parts of the width."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> GatedNorm:
        """y, z (B, T, I); formed by the product behind it."""
        # A copy: ZeRO-3 takes the parameter back when its module is done.
        return GatedNorm(y, z, self.weight.clone(), self.groups, self.eps)


class OutProjection(nn.Linear):
    """W (gated norm), (..., D)."""

    def forward(self, norm: GatedNorm) -> Tensor:  # type: ignore[override]
        return gated_norm_linear(norm, self.weight)


class Mamba2State(NamedTuple):
    """conv (B, K - 1, I + 2 G N), the last inputs of the convolution; ssm (B, H, P, N) in at least
    fp32."""

    position: Tensor
    phase: Tensor
    conv: Tensor
    ssm: Tensor


class Mamba2(TokenMixer):
    """The Mamba-2 layer.

    Args:
        d_model: model width.
        expand: inner width as a multiple of the model width.
        head_dim: P.
        d_state: N.
        n_groups: G; the norm's groups too.
        conv_taps: K.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        norm_eps: of the gated norm.
        chunk_size: tokens per chunk; documents begin on its multiples.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: int = 2,
        head_dim: int = 64,
        d_state: int = 128,
        n_groups: int = 1,
        conv_taps: int = 4,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        norm_eps: float = 1e-5,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        _check(d_model * expand, head_dim, d_state, n_groups, conv_taps, dt_min, dt_max, chunk_size)
        if norm_eps < 0:
            raise ValueError(f"mamba2.norm_eps={norm_eps} must not be negative")
        self.d_model, self.d_inner, self.head_dim = d_model, expand * d_model, head_dim
        self.n_heads, self.d_state, self.n_groups = self.d_inner // head_dim, d_state, n_groups
        self.conv_taps = conv_taps
        self.block_size = self.reset_grid = chunk_size
        self.conv_width = self.d_inner + 2 * n_groups * d_state
        outputs = self.d_inner + self.conv_width + self.n_heads
        self.in_proj = InProjection(d_model, self.d_inner, outputs)
        self.conv1d = ShortConvolution(self.conv_width, conv_taps)
        dt = torch.empty(self.n_heads).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus gives dt
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = GatedRMSNorm(self.d_inner, n_groups, norm_eps)
        self.out_proj = OutProjection(self.d_inner, d_model, bias=False)

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, *, resets: Tensor | None = None
    ) -> MixerOutput:
        clock = self.clock(x, state, resets)
        z, rest = self.in_proj(x)
        xbc, dt = rest.split([self.conv_width, self.n_heads], -1)
        before = None if state is None else state.conv
        xbc, conv = self.conv1d(xbc, before, clock.resets, clock.edges)
        width = self.n_groups * self.d_state
        u, b, c = xbc.split([self.d_inner, width, width], -1)
        u = u.unflatten(-1, (self.n_heads, self.head_dim))
        b, c = (part.unflatten(-1, (self.n_groups, self.d_state)) for part in (b, c))
        with no_autocast(x):
            wide = wide_dtype(x)
            dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
            y, ssm = ssd(
                u,
                dt,
                -dt * self.A_log.to(wide).exp(),
                b,
                c,
                self.D,
                None if state is None else state.ssm,
                resets=clock.resets,
                edges=clock.edges,
                chunk_size=self.block_size,
            )
        y = self.out_proj(self.norm(y.flatten(2), z))
        return MixerOutput(y, Mamba2State(*clock.after(x), conv, ssm), aux={})

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> Mamba2State:
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        conv = torch.zeros(
            batch_size, self.conv_taps - 1, self.conv_width, device=device, dtype=dtype
        )
        ssm = torch.zeros(
            (batch_size, self.n_heads, self.head_dim, self.d_state),
            device=device,
            dtype=torch.promote_types(dtype, torch.float32),
        )
        return Mamba2State(position, conv.new_empty(batch_size, 0, 0), conv, ssm)

    def flops_per_token(self, context: int) -> float:
        # The useful half of the products inside a chunk; in and out of states.
        inside = self.block_size * (self.n_groups * self.d_state + self.d_inner)
        return self._projections() + inside + 4 * self.d_inner * self.d_state

    def executed_flops(self, length: int) -> float:
        tail = length % self.block_size
        pairs = (length - tail) * self.block_size + tail**2
        inside = 2 * pairs * (self.n_groups * self.d_state + self.d_inner)
        return inside + length * (self._projections() + 4 * self.d_inner * self.d_state)

    def _projections(self) -> int:
        return 2 * self.d_model * (2 * self.d_inner + self.conv_width + self.n_heads)

    def no_decay_parameters(self) -> set[str]:
        return self.ssm_parameters()

    def ssm_parameters(self) -> set[str]:
        return {"A_log", "dt_bias", "D"}

    @torch.no_grad()
    def health(self) -> dict[str, Tensor]:
        dt = F.softplus(self.dt_bias.double())
        return {"dt": dt, "memory_horizon": 1 / (dt * self.A_log.double().exp())}


def _check(
    d_inner: int,
    head_dim: int,
    d_state: int,
    n_groups: int,
    conv_taps: int,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
) -> None:
    sizes = {
        "expand * d_model": d_inner,
        "head_dim": head_dim,
        "d_state": d_state,
        "n_groups": n_groups,
        "chunk_size": chunk_size,
    }
    for key, value in sizes.items():
        if value < 1:
            raise ValueError(f"mamba2.{key}={value} must be at least 1")
    if conv_taps < 2:
        raise ValueError(f"mamba2.conv_taps={conv_taps} must be at least 2: one tap mixes nothing")
    if d_inner % head_dim:
        raise ValueError(
            f"mamba2.head_dim={head_dim} does not divide expand * d_model = {d_inner}: choose "
            f"another head_dim"
        )
    if d_inner // head_dim % n_groups:
        raise ValueError(
            f"mamba2.n_groups={n_groups} does not divide the {d_inner // head_dim} heads: heads of "
            f"a group share b and c"
        )
    if not 0 < dt_min <= dt_max:
        raise ValueError(
            f"mamba2.dt_min={dt_min}, dt_max={dt_max}: step sizes are drawn between them, so "
            f"0 < dt_min <= dt_max must hold"
        )
