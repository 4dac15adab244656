"""Multi-dimensional damped EMA (MEGA, Ma et al. 2022, 2209.10655): an LTI op with real modes.

    p = sigmoid(delta)   q = 1 - p sigmoid(alpha)      a decay per channel and mode
    s_t = q s_{t-1} + u_t
    y_t = sum_n p beta gamma / sqrt(N) s_t + omega u_t

Shapes: B batch, T time, D channels, N modes, C chunk size.

`damped_ema` is the chunked Toeplitz form of `lti_ssm`, with half its state: real modes need no
conjugates. At MEGA's initialisation q is near 3/4, a memory of four tokens; the rest is learned.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.ops.channel_rows import channel_rows, tokens_of_rows
from pretrain.ops.chunk_scan import chunk_scan
from pretrain.ops.chunks import chunk_runs, kept_states
from pretrain.ops.lti_ssm import toeplitz
from pretrain.ops.numerics import no_autocast, wide_dtype

# Keeps log q finite where both sigmoids have saturated: such a mode forgets in one token anyway.
FASTEST_DECAY = 1 - 2.0**-20


class EMAParameters(NamedTuple):
    """delta, alpha, beta, gamma: (D, N); omega: (D,), the skip connection."""

    delta: Tensor
    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    omega: Tensor


def damped_ema(
    u: Tensor,
    parameters: EMAParameters,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The chunked form, linear in T at a few GEMMs.

    Args:
        u: (B, T, D).
        parameters: see `EMAParameters`.
        state: (B, D, N) in at least fp32, the state after the previous token; None: zero.
        resets: (B, n) bool, True where the state is zeroed before the token at that edge.
        edges: the n token offsets of `resets`; their spacing is a multiple of `chunk_size`.
        chunk_size: tokens per chunk; changes the speed, not the result.

    Returns:
        y (B, T, D) in the dtype of `u`, and the state after the last token, (B, D, N).

    Raises:
        ValueError: `chunk_size` does not divide the spacing of the edges.
    """
    length = u.shape[1]
    runs = chunk_runs(length, chunk_size, resets, edges)
    with no_autocast(u):
        log_q, weight, skip = coefficients(parameters, wide_dtype(u))
        steps = torch.arange(min(chunk_size, length) + 1, device=u.device, dtype=log_q.dtype)
        powers = (log_q.unsqueeze(1) * steps.unsqueeze(1)).exp()  # (D, C + 1, N): q^t
        read = weight.unsqueeze(1) * powers
        taps = read[:, :-1].sum(-1)
        taps = torch.cat([taps[:, :1] + skip.unsqueeze(1), taps[:, 1:]], 1)
        s = log_q.new_zeros(u.shape[0], *log_q.shape) if state is None else state.to(log_q.dtype)
        s = s.transpose(0, 1)
        outputs = []
        for start, stop, size in runs:
            keep = kept_states(resets, edges, start, stop, size)
            x = channel_rows(u[:, start:stop], size)
            local = torch.bmm(x, powers[:, :size].flip(1).to(x.dtype)).to(log_q.dtype)
            local = local.unflatten(1, (u.shape[0], -1))
            before, s = chunk_scan(local, powers[:, size], s, keep)
            y = torch.bmm(x, toeplitz(taps[:, :size]).to(x.dtype))
            carried = read[:, 1 : size + 1].transpose(1, 2).to(x.dtype)
            y = torch.baddbmm(y, before.flatten(1, 2).to(x.dtype), carried)
            outputs.append(tokens_of_rows(y, u.shape[0]))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return y, s.transpose(0, 1)


def damped_ema_naive(
    u: Tensor,
    parameters: EMAParameters,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the definition. Signature of `damped_ema`."""
    del chunk_size
    with no_autocast(u):
        log_q, weight, skip = coefficients(parameters, wide_dtype(u))
        s = log_q.new_zeros(u.shape[0], *log_q.shape) if state is None else state.to(log_q.dtype)
        outputs = []
        for t, x in enumerate(u.to(log_q.dtype).unbind(1)):
            if resets is not None and t in edges:
                s = s * ~resets[:, edges.index(t), None, None]
            s = log_q.exp() * s + x.unsqueeze(-1)
            outputs.append((weight * s).sum(-1) + skip * x)
    return torch.stack(outputs, 1).to(u.dtype), s


def coefficients(p: EMAParameters, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """log q (D, N), output weights (D, N) and the skip (D,)."""
    rate = p.delta.to(dtype).sigmoid()
    # log1p: a slow mode's q is too near 1 for its logarithm to be taken from q itself.
    log_q = torch.log1p(-(rate * p.alpha.to(dtype).sigmoid()).clamp(max=FASTEST_DECAY))
    weight = rate * p.beta.to(dtype) * p.gamma.to(dtype) / math.sqrt(p.delta.shape[1])
    return log_q, weight, p.omega.to(dtype)
