"""S4D layer: a diagonal linear state-space model per channel (Gu et al. 2022, 2206.11893).

    y = GLU(W gelu(SSM(x)))      SSM: see pretrain/ops/lti_ssm.py

Shapes: B batch, T time, D model width, N complex modes (the paper's state size is 2N).

The step sizes decide what it remembers: a mode's memory is 2 / dt tokens at initialisation, so
dt in [1e-3, 1e-1] spans 20 to 2,000 tokens and everything beyond is learned.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.ops.lti_ssm import SSMParameters, lti_ssm
from pretrain.ops.numerics import matmul_dtype

Init = Literal["lin", "legs", "real"]


class DiagonalSSM(nn.Module):
    """Parameters of a diagonal SSM with one filter per channel, and its application.

    Kernels are made anew for every call, of any length: nothing is tied to the training length.

    Args:
        d_model: channels.
        n_modes: complex modes per channel, one of each conjugate pair.
        dt_min: smallest initial step size; dt is drawn log-uniformly per channel.
        dt_max: largest initial step size.
        init: "lin" (S4D-Lin: Im A = pi n), "legs" (S4D-LegS: the spectrum of HiPPO-LegS) or "real"
            (A = -(n + 1), decays without oscillation, an EMA at every time scale).
        chunk_size: tokens per chunk of the Toeplitz form; speed only.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_modes: int = 16,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        init: Init = "lin",
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        self.d_model, self.n_modes, self.chunk_size = d_model, n_modes, chunk_size
        real, imag = _initial_spectrum(init, n_modes)
        # Real pairs throughout: complex parameters break under ZeRO.
        log_dt = torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max))
        self.log_dt = nn.Parameter(log_dt)
        self.log_A_real = nn.Parameter(real.log().float().repeat(d_model, 1))
        self.A_imag = nn.Parameter(imag.float().repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, n_modes, 2) * math.sqrt(0.5))  # CN(0, 1)
        self.D = nn.Parameter(torch.randn(d_model))

    def forward(
        self, u: Tensor, state: Tensor | None, resets: Tensor | None, edges: range
    ) -> tuple[Tensor, Tensor]:
        """u (B, T, D), state (B, D, 2, N) -> y like u, state after; see `lti_ssm`."""
        parameters = SSMParameters(self.log_dt, self.log_A_real, self.A_imag, self.C, self.D)
        return lti_ssm(
            u.to(matmul_dtype(u)),
            parameters,
            state,
            resets=resets,
            edges=edges,
            chunk_size=self.chunk_size,
        )

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, D, 2, N) zeros, in at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        # Not the parameters' shapes: outside of a forward ZeRO-3 leaves them empty.
        return torch.zeros(batch_size, self.d_model, 2, self.n_modes, device=device, dtype=wide)


def _initial_spectrum(init: Init, n_modes: int) -> tuple[Tensor, Tensor]:
    """-Re A and Im A of the N modes, fp64."""
    n = torch.arange(n_modes, dtype=torch.float64)
    if init == "lin":
        return torch.full_like(n, 0.5), math.pi * n
    if init == "real":
        return n + 1, torch.zeros_like(n)
    # HiPPO-LegS is normal plus low-rank; the normal part is -1/2 I plus a skew-symmetric matrix.
    root = torch.sqrt(2 * torch.arange(2 * n_modes, dtype=torch.float64) + 1)
    skew = torch.outer(root, root) / 2
    skew = skew.triu(1) - skew.tril(-1)
    return torch.full_like(n, 0.5), torch.linalg.eigvalsh(1j * skew)[n_modes:]


def check_ssm_options(mixer: str, n_modes: int, dt_min: float, dt_max: float, init: str) -> None:
    """Raises ValueError, with the reason, for options that no diagonal SSM can have."""
    if n_modes < 1:
        raise ValueError(f"{mixer}.n_modes={n_modes} must be at least 1")
    if not 0 < dt_min <= dt_max:
        raise ValueError(
            f"{mixer}.dt_min={dt_min}, dt_max={dt_max}: step sizes are drawn between them, so "
            f"0 < dt_min <= dt_max must hold"
        )
    if init not in ("lin", "legs", "real"):
        raise ValueError(f"{mixer}.init={init!r} is unknown: choose lin, legs or real")


class S4DState(NamedTuple):
    """ssm: (B, D, 2, N) in at least fp32."""

    position: Tensor
    phase: Tensor
    ssm: Tensor


class S4D(TokenMixer):
    """The S4D layer, causal.

    Args:
        d_model: model width.
        n_modes: complex modes per channel.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        init: "lin", "legs" or "real", see `DiagonalSSM`.
        chunk_size: tokens per chunk; documents begin on its multiples.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_modes: int = 16,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        init: Init = "lin",
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        check_ssm_options("s4d", n_modes, dt_min, dt_max, init)
        if chunk_size < 1:
            raise ValueError(f"s4d.chunk_size={chunk_size} must be at least 1 token")
        self.d_model, self.n_modes = d_model, n_modes
        self.block_size = self.reset_grid = chunk_size
        self.ssm = DiagonalSSM(
            d_model,
            n_modes=n_modes,
            dt_min=dt_min,
            dt_max=dt_max,
            init=init,
            chunk_size=chunk_size,
        )
        self.out_proj = nn.Linear(d_model, 2 * d_model, bias=False)

    def forward(
        self, x: Tensor, state: S4DState | None = None, *, resets: Tensor | None = None
    ) -> MixerOutput:
        clock = self.clock(x, state, resets)
        y, ssm = self.ssm(x, None if state is None else state.ssm, clock.resets, clock.edges)
        y = F.glu(self.out_proj(F.gelu(y)))
        return MixerOutput(y, S4DState(*clock.after(x), ssm), aux={})

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> S4DState:
        ssm = self.ssm.init_state(batch_size, device=device, dtype=dtype)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return S4DState(position, ssm.new_empty(batch_size, 0, 0), ssm)

    def flops_per_token(self, context: int) -> float:
        return 4 * self.d_model**2 + ssm_flops(self.d_model, self.n_modes, self.block_size)

    def executed_flops(self, length: int) -> float:
        return executed_ssm_flops(self.d_model, self.n_modes, self.block_size, length) + (
            4 * length * self.d_model**2
        )

    def no_decay_parameters(self) -> set[str]:
        return {f"ssm.{name}" for name in UNDECAYED}

    def ssm_parameters(self) -> set[str]:
        return {f"ssm.{name}" for name in UNDECAYED}


# A, dt and D; C, into which B is folded, is an ordinary output matrix.
UNDECAYED = ("log_dt", "log_A_real", "A_imag", "D")


def ssm_flops(d_model: int, n_modes: int, chunk_size: int) -> float:
    """Per token: the useful half of the Toeplitz product, and the products in and out of states."""
    return d_model * (chunk_size + 8 * n_modes)


def executed_ssm_flops(d_model: int, n_modes: int, chunk_size: int, length: int) -> float:
    """For one sequence, with both halves of the Toeplitz product; the last chunk may be short."""
    tail = length % chunk_size
    toeplitz = (length - tail) * 2 * chunk_size + 2 * tail**2
    return d_model * (toeplitz + length * 8 * n_modes)
