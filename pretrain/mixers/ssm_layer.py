"""What the state-space mixers share: two-sided filters, and the layer GLU(W gelu(SSM(x))).

    y_i = sum_{j <= i} k[i - j] x_j + D x_i  ( + sum_{j > i} k'[j - i - 1] x_j  where two-sided)

Shapes: B batch, T time, D model width, N complex modes (one of each conjugate pair).

Two-sided filters (encoders, `causal=False`) run a second kernel k' over the flipped input. It has
its own C and shares everything else, as in the code of S4 and SPADE, and begins one token later:
lag 0 counts once.
"""

import math
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.ops.numerics import matmul_dtype


class SequenceFilter(Protocol):
    """What a `StateSpaceLayer` asks of the module inside.

    Attributes:
        d_model: channels in and out.
        chunk_size: tokens per chunk; documents begin on its multiples.
        causal: False where both sides are seen; state and resets are None then.
    """

    d_model: int
    chunk_size: int
    causal: bool

    @property
    def undecayed(self) -> tuple[str, ...]:
        """Parameters without weight decay, at the state-space learning rate."""
        ...

    def __call__(
        self, u: Tensor, state: Tensor | None, resets: Tensor | None, edges: range, /
    ) -> tuple[Tensor, Tensor]:
        """u (B, T, D) and the state before it -> y like u and the state after it."""
        ...

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Zeros, in at least fp32, lanes first."""
        ...

    def flops_per_token(self) -> float:
        """By the convention, of both directions."""
        ...

    def executed_flops(self, length: int) -> float:
        """Of one sequence of `length` tokens, with both halves of a Toeplitz product."""
        ...

    def health(self) -> dict[str, Tensor]:
        """See `TokenMixer.health`."""
        ...


def tokens_ahead(u: Tensor) -> Tensor:
    """u (B, T, D) flipped in time and delayed by one: a causal filter then sees at its place for
    token i, T - 1 - i, the tokens i + 1 and on, so that lag 0 counts in the other direction only.
    """
    return F.pad(u.flip(1)[:, :-1], (0, 0, 1, 0))


class StateSpaceModel(nn.Module):
    """Step sizes, output matrix and skip connection of one filter per channel.

    A subclass has the rest of the system and its discretisation. Kernels are made anew for every
    call, of any length: nothing is tied to the training length.

    Args:
        d_model: channels.
        n_modes: complex modes per channel, one of each conjugate pair.
        dt_min: smallest initial step size; dt is drawn log-uniformly per channel.
        dt_max: largest initial step size.
        chunk_size: tokens per chunk of the Toeplitz form; speed only.
        causal: False adds the kernel for the flipped input.

    Attributes:
        undecayed: parameters without weight decay, at the state-space learning rate; C is an
            ordinary output matrix.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        d_model: int,
        *,
        n_modes: int,
        dt_min: float,
        dt_max: float,
        chunk_size: int,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.d_model, self.n_modes, self.chunk_size = d_model, n_modes, chunk_size
        self.causal = causal
        # Real pairs throughout: complex parameters break under ZeRO.
        log_dt = torch.empty(d_model).uniform_(math.log(dt_min), math.log(dt_max))
        self.log_dt = nn.Parameter(log_dt)
        self.C = nn.Parameter(torch.randn(d_model, n_modes, 2) * math.sqrt(0.5))  # CN(0, 1)
        self.D = nn.Parameter(torch.randn(d_model))
        self.C_reverse = None if causal else nn.Parameter(torch.randn_like(self.C) * math.sqrt(0.5))

    def filter(
        self,
        u: Tensor,
        output: Tensor,
        skip: Tensor,
        state: Tensor | None,
        resets: Tensor | None,
        edges: range,
    ) -> tuple[Tensor, Tensor]:
        """u (B, T, D) through the causal filters with C = `output` and D = `skip`."""
        raise TypeError(f"{type(self).__name__} does not define filter")

    def forward(
        self, u: Tensor, state: Tensor | None, resets: Tensor | None, edges: range
    ) -> tuple[Tensor, Tensor]:
        """u (B, T, D), state (B, D, 2, N) -> y like u, state after; see `lti_ssm`."""
        u = u.to(matmul_dtype(u))
        y, state = self.filter(u, self.C, self.D, state, resets, edges)
        if self.C_reverse is not None:
            none = torch.zeros_like(self.D)
            ahead, _ = self.filter(tokens_ahead(u), self.C_reverse, none, None, None, range(0))
            y = y + ahead.flip(1)
        return y, state

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, D, 2, N) zeros, in at least fp32."""
        wide = torch.promote_types(dtype, torch.float32)
        # Not the parameters' shapes: outside of a forward ZeRO-3 leaves them empty.
        return torch.zeros(batch_size, self.d_model, 2, self.n_modes, device=device, dtype=wide)

    def flops_per_token(self) -> float:
        """By the convention, of all channels and both directions."""
        raise TypeError(f"{type(self).__name__} does not define flops_per_token")

    def executed_flops(self, length: int) -> float:
        """Of one sequence of `length` tokens, with both halves of the Toeplitz product."""
        raise TypeError(f"{type(self).__name__} does not define executed_flops")

    def health(self) -> dict[str, Tensor]:
        """See `TokenMixer.health`."""
        raise TypeError(f"{type(self).__name__} does not define health")


class SSMState(NamedTuple):
    """ssm: the SSM's own, (B, D, 2, N) where each channel has one; in at least fp32."""

    position: Tensor
    phase: Tensor
    ssm: Tensor


class StateSpaceLayer(TokenMixer):
    """GLU(W gelu(SSM(x))), causal or two-sided, as the SSM is.

    Args:
        ssm: a module that filters along time.
    """

    two_sided = True

    def __init__(self, ssm: SequenceFilter) -> None:
        super().__init__()
        self.d_model, self.causal = ssm.d_model, ssm.causal
        self.block_size = self.reset_grid = ssm.chunk_size
        self.ssm = ssm
        self.out_proj = nn.Linear(self.d_model, 2 * self.d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: SSMState | None = None,
        *,
        resets: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> MixerOutput:
        self.check_sides(state, resets, padding)
        clock = self.clock(x, state, resets)
        if padding is not None:
            x = x.masked_fill(padding.unsqueeze(-1), 0)
        y, ssm = self.ssm(x, None if state is None else state.ssm, clock.resets, clock.edges)
        # Laid out here: compiled, the product and its weight's gradient would write one copy each.
        y = F.glu(self.out_proj(F.gelu(y).contiguous()))
        return MixerOutput(y, SSMState(*clock.after(x), ssm) if self.causal else None, aux={})

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> SSMState:
        ssm = self.ssm.init_state(batch_size, device=device, dtype=dtype)
        position = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return SSMState(position, ssm.new_empty(batch_size, 0, 0), ssm)

    def flops_per_token(self, context: int) -> float:
        return 4 * self.d_model**2 + self.ssm.flops_per_token()

    def executed_flops(self, length: int) -> float:
        return 4 * length * self.d_model**2 + self.ssm.executed_flops(length)

    def no_decay_parameters(self) -> set[str]:
        return self.ssm_parameters()

    def ssm_parameters(self) -> set[str]:
        return {f"ssm.{name}" for name in self.ssm.undecayed}

    def health(self) -> dict[str, Tensor]:
        return self.ssm.health()


def check_step_sizes(mixer: str, n_modes: int, dt_min: float, dt_max: float) -> None:
    """Raises ValueError, with the reason, for sizes that no state-space model can have."""
    if n_modes < 1:
        raise ValueError(f"{mixer}.n_modes={n_modes} must be at least 1")
    if not 0 < dt_min <= dt_max:
        raise ValueError(
            f"{mixer}.dt_min={dt_min}, dt_max={dt_max}: step sizes are drawn between them, so "
            f"0 < dt_min <= dt_max must hold"
        )


def check_chunk_size(mixer: str, chunk_size: int) -> None:
    """Raises ValueError for an empty chunk."""
    if chunk_size < 1:
        raise ValueError(f"{mixer}.chunk_size={chunk_size} must be at least 1 token")
