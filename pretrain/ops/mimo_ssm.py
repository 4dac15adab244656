"""Diagonal state-space op with many inputs and outputs, of S5 (Smith et al. 2022, 2208.04933).

    s_t = z s_{t-1} + b u_t         z = exp(dt A), b = (exp(dt A) - 1)/A B     zero-order hold
    y_t = 2 Re(C s_t) + D u_t

Shapes: B batch, T time, D channels, P complex modes (one of each conjugate pair), C chunk size.

All channels share one state, so B and C are ordinary matrices and the recurrence between them runs
over P numbers instead of D N: S5's price is two projections and no longer convolutions. Where S5
has an associative scan, the chunked form convolves inside a chunk, by a Toeplitz matrix per mode,
and scans over chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.ops.chunk_scan import chunk_scan
from pretrain.ops.chunks import chunk_runs, kept_states
from pretrain.ops.lti_ssm import SSMParameters, discretise, mode_powers, toeplitz
from pretrain.ops.numerics import no_autocast, wide_dtype


class MIMOParameters(NamedTuple):
    """Continuous-time parameters.

    Attributes:
        log_dt: (P,) log step size.
        log_A_real: (P,), A = -exp(log_A_real) + i A_imag.
        A_imag: (P,).
        B: (P, D, 2) input matrix as (re, im) pairs.
        C: (D, P, 2) output matrix.
        D: (D,) skip connection.
    """

    log_dt: Tensor
    log_A_real: Tensor
    A_imag: Tensor
    B: Tensor
    C: Tensor
    D: Tensor


def mimo_ssm(
    u: Tensor,
    parameters: MIMOParameters,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """The chunked form, linear in T at a few GEMMs.

    Args:
        u: (B, T, D).
        parameters: see `MIMOParameters`.
        state: (B, 2, P) in at least fp32, the state after the previous token; None: zero.
        resets: (B, n) bool, True where the state is zeroed before the token at that edge.
        edges: the n token offsets of `resets`; their spacing is a multiple of `chunk_size`.
        chunk_size: tokens per chunk; changes the speed, not the result.

    Returns:
        y (B, T, D) in the dtype of `u`, and the state after the last token, (B, 2, P).

    Raises:
        ValueError: `chunk_size` does not divide the spacing of the edges.
    """
    length, batch = u.shape[1], u.shape[0]
    runs = chunk_runs(length, chunk_size, resets, edges)
    with no_autocast(u):
        wide = wide_dtype(u)
        decay, angle, into, out = _matrices(parameters, wide)
        steps = torch.arange(min(chunk_size, length) + 1, device=u.device)
        re, im = (part.squeeze(-1) for part in mode_powers(decay, angle, steps))  # (P, C + 1): z^t
        s = re.new_zeros(len(re), batch, 1, 2)
        if state is not None:
            s = state.to(wide).permute(2, 0, 1).unsqueeze(2)
        driven = (u @ into.to(u.dtype)).unflatten(-1, (2, -1)).permute(3, 0, 1, 2)  # (P, B, T, 2)
        states = []
        for start, stop, size in runs:
            keep = kept_states(resets, edges, start, stop, size)
            part, s = _chunks(driven[:, :, start:stop], re, im, s, keep, size)
            states.append(part)
        x = torch.cat(states, 2).permute(1, 2, 3, 0).flatten(2)  # (B, T, 2P)
        y = x @ out.to(x.dtype) + u * parameters.D.to(u.dtype)
    return y, s.squeeze(2).permute(1, 2, 0)


def _matrices(p: MIMOParameters, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dt A as decay and angle, (P, 1) each; [Re b; Im b] (D, 2P); 2 [Re C; -Im C] (2P, D)."""
    one = torch.eye(1, 2, dtype=dtype, device=p.B.device).expand(len(p.B), 1, 2)  # 1 + 0i
    modes = SSMParameters(p.log_dt, p.log_A_real.unsqueeze(1), p.A_imag.unsqueeze(1), one, p.D)
    decay, angle, hold_re, hold_im = discretise(modes, dtype)  # hold = (exp(dt A) - 1) / A
    b_re, b_im = p.B.to(dtype).unbind(-1)
    c_re, c_im = p.C.to(dtype).unbind(-1)
    into = torch.cat([hold_re * b_re - hold_im * b_im, hold_re * b_im + hold_im * b_re])
    return decay, angle, into.T, 2 * torch.cat([c_re, -c_im], 1).T


def _chunks(
    driven: Tensor, re: Tensor, im: Tensor, s: Tensor, keep: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Whole chunks of `size` tokens: every state inside, and the last.

    driven (P, B, chunks * size, 2), re and im (P, > size), s (P, B, 1, 2) -> like driven, s.
    """
    modes, batch, length, _ = driven.shape
    x = driven.reshape(modes, -1, size, 2).transpose(2, 3).flatten(2)  # re, then im, of a chunk
    t_re, t_im = toeplitz(re[:, :size]), toeplitz(im[:, :size])
    turn = torch.cat([torch.cat([t_re, t_im], 2), torch.cat([-t_im, t_re], 2)], 1)
    x = torch.bmm(x, turn.to(x.dtype)).view(modes, batch, -1, 2, size)
    local = x[..., -1].to(re.dtype).unsqueeze(3).contiguous()
    decay = torch.stack([re[:, size], im[:, size]], -1).unsqueeze(1)
    before, s = chunk_scan(local, decay, s, keep)
    # The state before the chunk, decayed by 1 .. size steps.
    b_re, b_im = before.squeeze(3).unsqueeze(-2).unbind(-1)  # (P, B, chunks, 1)
    z_re, z_im = (z[:, None, None, 1 : size + 1] for z in (re, im))
    carried = torch.stack([b_re * z_re - b_im * z_im, b_re * z_im + b_im * z_re], 3)
    x = x + carried.to(x.dtype)
    return x.transpose(3, 4).reshape(modes, batch, length, 2), s


def mimo_ssm_naive(
    u: Tensor,
    parameters: MIMOParameters,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the definition. Signature of `mimo_ssm`."""
    del chunk_size
    with no_autocast(u):
        dtype = wide_dtype(u)
        p = MIMOParameters(*(part.to(dtype) for part in parameters))
        a = torch.complex(-p.log_A_real.exp(), p.A_imag)
        z = (p.log_dt.exp() * a).exp()
        b = ((z - 1) / a).unsqueeze(1) * torch.view_as_complex(p.B.contiguous())
        c = torch.view_as_complex(p.C.contiguous())
        s = z.new_zeros(u.shape[0], len(z))
        if state is not None:
            s = torch.complex(*state.to(dtype).unbind(1))
        outputs = []
        for t, x in enumerate(u.to(dtype).unbind(1)):
            if resets is not None and t in edges:
                s = s * ~resets[:, edges.index(t), None]
            s = z * s + x.to(b.dtype) @ b.T
            outputs.append(2 * (s @ c.T).real + p.D * x)
    return torch.stack(outputs, 1).to(u.dtype), torch.stack([s.real, s.imag], 1)
