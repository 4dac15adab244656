"""Diagonal linear time-invariant state-space op: three twins of one signature.

    s_t = z s_{t-1} + u_t        z = exp(dt A)                  a state per channel and mode
    y_t = 2 Re(c . s_t) + D u_t  c = C (exp(dt A) - 1) / A      zero-order hold, B = 1

(S4D, Gu et al. 2022, 2206.11893.)
Shapes: B batch, T time, D channels, N complex modes (one of each conjugate pair), C chunk size.

`lti_ssm` is the chunked Toeplitz form: inside a chunk the convolution is a (C, C) matrix per
channel that all B*T/C chunks share, so it is a true GEMM, and a scan hands the state on from chunk
to chunk. It beats an FFT although it does more arithmetic, and unlike an FFT it is causal to the
last bit: a future token only ever meets an exact zero. Operators are made in at least fp32; the
GEMM operands have the dtype of `u`.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.chunks import chunk_runs, kept_states
from pretrain.ops.numerics import no_autocast, wide_dtype
from pretrain.ops.ssm_chunks import ssm_chunks, ssm_chunks_of_modes


class SSMParameters(NamedTuple):
    """Continuous-time parameters; A = -exp(log_A_real) + i A_imag never leaves the left half-plane.

    Attributes:
        log_dt: (D,) log step size.
        log_A_real: (D, N).
        A_imag: (D, N).
        C: (D, N, 2) output matrix as (re, im) pairs, B folded in.
        D: (D,) skip connection.
    """

    log_dt: Tensor
    log_A_real: Tensor
    A_imag: Tensor
    C: Tensor
    D: Tensor


def lti_ssm(
    u: Tensor,
    parameters: SSMParameters,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The chunked Toeplitz form, linear in T at a few GEMMs; the default.

    Args:
        u: (B, T, D).
        parameters: see `SSMParameters`.
        state: (B, D, 2, N) in at least fp32, the state after the previous token; None: zero.
        resets: (B, n) bool, True where the state is zeroed before the token at that edge.
        edges: the n token offsets of `resets`; their spacing is a multiple of `chunk_size`.
        chunk_size: tokens per chunk; changes the speed, not the result.

    Returns:
        y (B, T, D) in the dtype of `u`, in channel-major memory, and the state after the last
        token, (B, D, 2, N).

    Raises:
        ValueError: `chunk_size` does not divide the spacing of the edges.
    """
    length = u.shape[1]
    runs = chunk_runs(length, chunk_size, resets, edges)
    with no_autocast(u):
        wide = wide_dtype(u)
        run = _formed_by_kernel if u.is_cuda and u.element_size() < 4 else _formed_by_torch
        chunks = run(parameters, min(chunk_size, length), wide)
        if state is None:
            s = parameters.A_imag.new_zeros(u.shape[2], u.shape[0], parameters.A_imag.shape[1], 2)
        else:
            s = state.transpose(-1, -2).transpose(0, 1)
        s = s.to(wide).contiguous()
        outputs = []
        for start, stop, size in runs:
            keep = kept_states(resets, edges, start, stop, size)
            y, s = chunks(u[:, start:stop], s, keep, size)
            outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    return y.permute(1, 2, 0), s.transpose(0, 1).transpose(-1, -2)


class _ChunkOperators(NamedTuple):
    """For chunks of up to C tokens.

    taps (D, C): the convolution kernel. powers (D, C + 1, 2N): z^t. carry_out (D, 2N, C): what a
    state before the chunk adds to its outputs. All in at least fp32.
    """

    taps: Tensor
    powers: Tensor
    carry_out: Tensor


def discretise(p: SSMParameters, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt A and c as four (D, N) tensors: decay, angle (per token), c_re, c_im."""
    dt = p.log_dt.to(dtype).exp().unsqueeze(-1)
    a_re, a_im = -p.log_A_real.to(dtype).exp(), p.A_imag.to(dtype)
    decay, angle = dt * a_re, dt * a_im
    # exp(dt A) - 1 without cancellation: dt A is ~1e-3 for slow channels.
    growth = decay.exp()
    num_re = torch.expm1(decay) * angle.cos() - 2 * (angle / 2).sin().square()
    num_im = growth * angle.sin()
    norm = a_re.square() + a_im.square()
    b_re = (num_re * a_re + num_im * a_im) / norm
    b_im = (num_im * a_re - num_re * a_im) / norm
    c_re, c_im = p.C.to(dtype).unbind(-1)
    return decay, angle, c_re * b_re - c_im * b_im, c_re * b_im + c_im * b_re


def mode_powers(decay: Tensor, angle: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """z^t for t in `steps` (K,): re and im, each (D, K, N)."""
    t = steps.to(decay.dtype).unsqueeze(-1)
    magnitude, phase = (decay.unsqueeze(1) * t).exp(), angle.unsqueeze(1) * t
    return magnitude * phase.cos(), magnitude * phase.sin()


def _chunk_operators(p: SSMParameters, size: int, dtype: torch.dtype) -> _ChunkOperators:
    decay, angle, c_re, c_im = discretise(p, dtype)
    re, im = mode_powers(decay, angle, torch.arange(size + 1, device=decay.device))
    c_re, c_im = 2 * c_re.unsqueeze(1), 2 * c_im.unsqueeze(1)
    out_re = c_re * re - c_im * im  # Re(2 c z^t)
    out_im = c_re * im + c_im * re
    taps = out_re[:, :size].sum(-1)
    taps = torch.cat([taps[:, :1] + p.D.to(dtype).unsqueeze(-1), taps[:, 1:]], 1)
    # (re, im) pairs are interleaved along 2N: the scan then views them as complex without a copy.
    powers = torch.stack([re, im], -1).flatten(-2)
    carry_out = torch.stack([out_re[:, 1:], -out_im[:, 1:]], -1).flatten(-2).transpose(1, 2)
    return _ChunkOperators(taps, powers, carry_out)


def toeplitz(taps: Tensor) -> Tensor:
    """(D, C) -> (D, C, C), entry [j, i] = taps[i - j] for i >= j, else 0.

    Rows repeated with period C + 1 and read with period C shift by one each; no gather, whose
    backward would be a scatter.
    """
    channels, size = taps.shape
    rows = F.pad(taps, (0, 1)).unsqueeze(1).expand(channels, size, size + 1)
    return rows.reshape(channels, -1)[:, : size * size].view(channels, size, size).triu()


# Whole chunks of `size` tokens: u (B, chunks * size, D), s (D, B, N, 2) -> y (D, B, T), s.
Chunks = Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]


def _formed_by_torch(p: SSMParameters, largest: int, dtype: torch.dtype) -> Chunks:
    taps, powers, carry_out = _chunk_operators(p, largest, dtype)

    def run(u: Tensor, s: Tensor, keep: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
        carry_in = powers[:, :size].flip(1)  # token j of a chunk has decayed size - 1 - j times
        above = torch.cat([toeplitz(taps[:, :size]), carry_in], 2)
        below = torch.cat([carry_out[:, :, :size], _rotations(powers[:, size])], 2)
        return ssm_chunks(u, torch.cat([above, below], 1), s, keep)[:2]

    return run


def _rotations(z: Tensor) -> Tensor:
    """(D, 2N) as (re, im) pairs -> (D, 2N, 2N), blocks [[re, im], [-im, re]] on the diagonal."""
    re, im = z.unflatten(-1, (-1, 2)).unbind(-1)
    blocks = torch.stack([re, im, -im, re], -1).unflatten(-1, (2, 2))  # (D, N, 2, 2)
    diagonal = torch.eye(re.shape[1], dtype=z.dtype, device=z.device)[:, None, :, None]
    return (blocks.unsqueeze(3) * diagonal).flatten(3, 4).flatten(1, 2)


def _formed_by_kernel(p: SSMParameters, largest: int, dtype: torch.dtype) -> Chunks:
    del largest  # each run forms its own
    modes = *discretise(p, dtype), p.D.to(dtype)

    def run(u: Tensor, s: Tensor, keep: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
        return ssm_chunks_of_modes(u, *modes, s, keep, size)[:2]

    return run


def lti_ssm_naive(
    u: Tensor,
    parameters: SSMParameters,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the definition. Signature of `lti_ssm`."""
    del chunk_size
    with no_autocast(u):
        dtype = wide_dtype(u)
        decay, angle, c_re, c_im = discretise(parameters, dtype)
        z_re, z_im = decay.exp() * angle.cos(), decay.exp() * angle.sin()
        re, im = _initial_state(u, state, z_re)
        skip = parameters.D.to(dtype)
        outputs = []
        for t, x in enumerate(u.to(dtype).unbind(1)):
            if resets is not None and t in edges:
                keep = ~resets[:, edges.index(t), None, None]
                re, im = re * keep, im * keep
            re, im = z_re * re - z_im * im + x.unsqueeze(-1), z_re * im + z_im * re
            outputs.append(2 * (c_re * re - c_im * im).sum(-1) + skip * x)
    return torch.stack(outputs, 1).to(u.dtype), torch.stack([re, im], 2)


def lti_ssm_fft(
    u: Tensor,
    parameters: SSMParameters,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Convolution by FFT, what public S4 code does. Signature of `lti_ssm`.

    A reset cannot be expressed in a convolution: with `resets` the call runs segment by segment.
    """
    del chunk_size
    inner_edges = [edge for edge in edges if edge > 0] if resets is not None else []
    outputs = []
    with no_autocast(u):
        for start, stop in pairwise([0, *inner_edges, u.shape[1]]):
            if resets is not None and start in edges and state is not None:
                state = state * ~resets[:, edges.index(start), None, None, None]
            y, state = _fft_segment(u[:, start:stop], parameters, state)
            outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state


def _fft_segment(u: Tensor, p: SSMParameters, state: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(u)
    length, channels = u.shape[1:]
    decay, angle, c_re, c_im = discretise(p, dtype)
    # Factored Vandermonde: z^(qQ + r) = z^(qQ) z^r, so nothing of size (D, N, T) is ever made.
    inner = min(length, max(1, math.isqrt(length)))
    outer = -(-length // inner)
    low_re, low_im = mode_powers(decay, angle, torch.arange(inner, device=u.device))  # (D, Q, N)
    high_re, high_im = mode_powers(decay, angle, inner * torch.arange(outer + 1, device=u.device))

    # The kernel, padded to outer * inner taps: Re(2 c z^(qQ) . z^r) is a real product over 2N.
    w_re, w_im = 2 * c_re.unsqueeze(1), 2 * c_im.unsqueeze(1)
    left = torch.cat([w_re * high_re - w_im * high_im, -(w_re * high_im + w_im * high_re)], -1)
    right = torch.cat([low_re, low_im], -1).transpose(1, 2)
    kernel = torch.bmm(left[:, :outer], right).flatten(1)[:, :length]

    x = u.to(dtype).permute(2, 0, 1)  # (D, B, T)
    size = 2 * length  # anything shorter is a circular convolution: the future would leak in
    spectrum = torch.fft.rfft(x, n=size) * torch.fft.rfft(kernel, n=size).unsqueeze(1)
    y = torch.fft.irfft(spectrum, n=size)[..., :length] + p.D.to(dtype)[:, None, None] * x

    re, im = _initial_state(u, state, low_re[:, 0])
    z_re, z_im = mode_powers(decay, angle, torch.ones(1, device=u.device))
    after_re, after_im = z_re[:, 0] * re - z_im[:, 0] * im, z_re[:, 0] * im + z_im[:, 0] * re
    # Carried state: 2 Re(c z^(t+1) s) for every t by the same factoring, with z s in place of s.
    rows_re = torch.einsum("dqn,bdn->dbqn", left[:, :outer, : re.shape[-1]], after_re)
    rows_re = rows_re + torch.einsum("dqn,bdn->dbqn", left[:, :outer, re.shape[-1] :], after_im)
    rows_im = torch.einsum("dqn,bdn->dbqn", left[:, :outer, re.shape[-1] :], after_re)
    rows_im = rows_im - torch.einsum("dqn,bdn->dbqn", left[:, :outer, : re.shape[-1]], after_im)
    carried = torch.einsum("dbqn,dnr->dbqr", torch.cat([rows_re, rows_im], -1), right)
    y = y + carried.flatten(2)[..., :length]

    # Final state: sum_t z^(T-1-t) u_t + z^T s, on the reversed input padded to whole rows.
    tail = F.pad(x.flip(-1), (0, outer * inner - length)).view(channels, -1, outer, inner)
    part_re = torch.einsum("dbqr,drn->dbqn", tail, low_re)
    part_im = torch.einsum("dbqr,drn->dbqn", tail, low_im)
    hi_re, hi_im = high_re[:, None, :outer], high_im[:, None, :outer]
    sum_re = (part_re * hi_re - part_im * hi_im).sum(2).transpose(0, 1)
    sum_im = (part_re * hi_im + part_im * hi_re).sum(2).transpose(0, 1)
    t_re, t_im = mode_powers(decay, angle, torch.full((1,), length, device=u.device))
    end_re = t_re[:, 0] * re - t_im[:, 0] * im + sum_re
    end_im = t_re[:, 0] * im + t_im[:, 0] * re + sum_im
    return y.permute(1, 2, 0).to(u.dtype), torch.stack([end_re, end_im], 2)


def _initial_state(u: Tensor, state: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Re and im of the carried state, (B, D, N) each; zeros without one."""
    if state is None:
        zeros = like.new_zeros(u.shape[0], *like.shape)
        return zeros, zeros
    re, im = state.to(like.dtype).unbind(2)
    return re, im
