"""Normal-plus-low-rank (NPLR) state-space op of S4 (Gu et al. 2022, 2111.00396): two twins.

    A   = diag(Lambda) - p p^*             one system per channel, in conjugate pairs of modes
    dA  = (I - dt/2 A)^-1 (I + dt/2 A)     bilinear (Tustin) discretisation
    dB  = (I - dt/2 A)^-1 dt B
    s_t = dA s_{t-1} + dB u_t ;  y_t = 2 Re(C . s_t) + D u_t

Shapes: B batch, T time, D channels, N complex modes (one of each conjugate pair), C chunk size.

The low-rank term couples a mode to the *conjugates* of the others, so dA is linear over the reals
only: the state is kept as 2N real numbers, dA as a real (2N, 2N) matrix, and nothing is complex.
Where S4 evaluates a kernel of the whole length by a Cauchy kernel and an FFT, the chunked form
needs the kernel of one chunk and dense powers of dA, which doubling makes in log2 C matmuls; so the
stored C is the C of the equations and not C (I - dA^L), which ties it to a length L.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pretrain.ops.channel_rows import channel_rows, tokens_of_rows
from pretrain.ops.chunks import chunk_runs, kept_states
from pretrain.ops.lti_ssm import toeplitz
from pretrain.ops.numerics import no_autocast, wide_dtype


class NPLRParameters(NamedTuple):
    """Continuous-time parameters; A + A^* is negative definite, whatever their values.

    Attributes:
        log_dt: (D,) log step size.
        log_A_real: (D, N), Lambda = -exp(log_A_real) + i A_imag.
        A_imag: (D, N).
        P: (D, N, 2) the low-rank factor p as (re, im) pairs.
        B: (D, N, 2) input matrix.
        C: (D, N, 2) output matrix.
        D: (D,) skip connection.
    """

    log_dt: Tensor
    log_A_real: Tensor
    A_imag: Tensor
    P: Tensor
    B: Tensor
    C: Tensor
    D: Tensor


def nplr_ssm(
    u: Tensor,
    parameters: NPLRParameters,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The chunked Toeplitz form, linear in T; the default.

    Args:
        u: (B, T, D).
        parameters: see `NPLRParameters`.
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
    with no_autocast(u):
        operators = _chunk_operators(parameters, min(chunk_size, length), wide_dtype(u))
        s = None if state is None else state.flatten(2).transpose(0, 1)
        outputs = []
        for start, stop, size in chunk_runs(length, chunk_size, resets, edges):
            keep = kept_states(resets, edges, start, stop, size)
            y, s = _chunks(u[:, start:stop], operators, s, keep, size)
            outputs.append(y)
        assert s is not None
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return y, s.transpose(0, 1).unflatten(-1, (2, -1))


class _ChunkOperators(NamedTuple):
    """For chunks of up to C tokens, all in at least fp32.

    taps (D, C): the convolution kernel. carry_in (D, 2N, C): dA^t dB. carry_out (D, 2N, C): what a
    state before the chunk adds to its outputs, c dA^(t+1). squares: dA^(2^i), (D, 2N, 2N) each.
    """

    taps: Tensor
    carry_in: Tensor
    carry_out: Tensor
    squares: list[Tensor]

    def transition(self, size: int) -> Tensor:
        """dA^size, by its binary digits."""
        factors = [square for i, square in enumerate(self.squares) if size >> i & 1]
        power = factors[0]
        for factor in factors[1:]:
            power = power @ factor
        return power


def discretise(p: NPLRParameters, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dA (D, 2N, 2N), dB (D, 2N) and the output row c (D, 2N) over the state [re; im].

    I - dt/2 A is diagonal plus dt q q^T with q = [re p; im p]: Sherman and Morrison invert it
    elementwise, and dA = 2 (I - dt/2 A)^-1 - I.
    """
    dt = p.log_dt.to(dtype).exp().unsqueeze(-1)
    real, imag = 1 + dt / 2 * p.log_A_real.to(dtype).exp(), -dt / 2 * p.A_imag.to(dtype)
    norm = real.square() + imag.square()
    e_re, e_im = real / norm, -imag / norm  # 1 / (1 - dt/2 Lambda)
    p_re, p_im = p.P.to(dtype).unbind(-1)
    b_re, b_im = p.B.to(dtype).unbind(-1)
    c_re, c_im = p.C.to(dtype).unbind(-1)

    q = torch.cat([p_re, p_im], -1)
    left = torch.cat([e_re * p_re - e_im * p_im, e_im * p_re + e_re * p_im], -1)  # E q
    right = torch.cat([e_re * p_re + e_im * p_im, e_re * p_im - e_im * p_re], -1)  # E^T q
    left = left * (dt / (1 + dt * (q * left).sum(-1, keepdim=True)))
    b = torch.cat([e_re * b_re - e_im * b_im, e_im * b_re + e_re * b_im], -1)  # E B
    b = b - left * (right * torch.cat([b_re, b_im], -1)).sum(-1, keepdim=True)

    rows = [torch.diag_embed(torch.stack(pair)) for pair in ((e_re, -e_im), (e_im, e_re))]
    diagonal = torch.cat([torch.cat(list(row), -1) for row in rows], -2)
    inverse = diagonal - left.unsqueeze(-1) * right.unsqueeze(-2)
    eye = torch.eye(q.shape[-1], dtype=dtype, device=q.device)
    return 2 * inverse - eye, dt * b, 2 * torch.cat([c_re, -c_im], -1)


def _chunk_operators(p: NPLRParameters, size: int, dtype: torch.dtype) -> _ChunkOperators:
    step, b, c = discretise(p, dtype)
    states = b.shape[1]
    # [dA^k | b, dA b, .. dA^(k-1) b]: one product squares the power and doubles the columns.
    known, carry_out = torch.cat([step, b.unsqueeze(-1)], -1), c.unsqueeze(1) @ step
    squares = [step]
    while carry_out.shape[1] < size:
        power, carry_in = known.split([states, carry_out.shape[1]], -1)
        ahead = power @ known
        known = torch.cat([ahead[..., :states], carry_in, ahead[..., states:]], -1)
        carry_out = torch.cat([carry_out, carry_out @ power], 1)
        squares.append(known[..., :states])
    carry_in, carry_out = known[..., states : states + size], carry_out[:, :size].mT
    taps = (c.unsqueeze(1) @ carry_in).squeeze(1)
    taps = torch.cat([taps[:, :1] + p.D.to(dtype).unsqueeze(-1), taps[:, 1:]], 1)
    return _ChunkOperators(taps, carry_in, carry_out, squares)


def operator_flops(n_modes: int, size: int) -> float:
    """Of the matmuls that make the operators of one channel, once per call."""
    states, flops, made = 2 * n_modes, 2.0 * (2 * n_modes) ** 2, 1
    while made < size:
        flops += 2 * (2 * made + states) * states**2
        made *= 2
    return flops + 2 * states * size


def transition_flops(n_modes: int, size: int) -> float:
    """Of the matmuls that make dA^size for one channel from the squares."""
    return 2.0 * (2 * n_modes) ** 3 * (size.bit_count() - 1)


def _chunks(
    u: Tensor, operators: _ChunkOperators, s: Tensor | None, keep: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """Whole chunks of `size` tokens. u (B, T = chunks * size, D), s (D, B, 2N) -> y like u, s."""
    batch, _, channels = u.shape
    states, wide = operators.carry_out.shape[1], operators.taps.dtype
    x = channel_rows(u, size)
    carry_in = operators.carry_in[..., :size].flip(-1).transpose(1, 2)
    local = torch.bmm(x, carry_in.to(x.dtype)).to(wide)
    local = local.unflatten(1, (batch, -1))
    if s is None:
        s = local.new_zeros(channels, batch, states)
    before, s = _dense_scan(local, operators.transition(size), s.to(wide), keep)
    y = torch.bmm(x, toeplitz(operators.taps[:, :size]).to(x.dtype))
    carry_out = operators.carry_out[..., :size].to(x.dtype)
    y = torch.baddbmm(y, before.flatten(1, 2).to(x.dtype), carry_out)
    return tokens_of_rows(y, batch), s


@torch.library.custom_op("longspan::dense_scan", mutates_args=())
def _dense_scan(
    local: Tensor, matrix: Tensor, s: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """before_{j+1} = M before_j + local_j over chunks, M a matrix per channel.

    An operator of its own, because a compiler would unroll the loop.

    Args:
        local: (D, B, J, M), what each of J chunks adds.
        matrix: (D, M, M).
        s: (D, B, M), the state before the first chunk.
        keep: (B, J) bool, False where the state is zeroed before a chunk.

    Returns:
        The states before each chunk, like `local`, and the last one, like `s`.
    """
    return _scan(local, matrix, s, keep, reverse=False)


@torch.library.custom_op("longspan::dense_scan_backward", mutates_args=())
def _dense_scan_backward(
    d_before: Tensor, d_s: Tensor, before: Tensor, matrix: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan from the right with the transposed matrix: gradients of local, matrix and s."""
    d_local, d_start = _scan(d_before, matrix, d_s, keep, reverse=True)
    d_matrix = torch.bmm(d_local.flatten(1, 2).transpose(1, 2), before.flatten(1, 2))
    return d_local, d_matrix, d_start


def _scan(
    local: Tensor, matrix: Tensor, s: Tensor, keep: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """As `pretrain.ops.chunk_scan.scan_into`, with matrices; returns `before`, too.

    By a kernel on a GPU, in fp32 and for states of up to its `WIDEST` words, else step by step.
    """
    before = local.new_empty(local.shape)
    if local.is_cuda and local.dtype == torch.float32:
        from pretrain.ops import dense_scan_kernel

        if local.shape[-1] <= dense_scan_kernel.WIDEST:
            with torch.cuda.device_of(local):
                last = dense_scan_kernel.scan_into(local, matrix, s, keep, before, reverse=reverse)
            return before, last
    factor, now, chunks = matrix.transpose(1, 2), s, range(local.shape[2])
    if reverse:
        factor, chunks = matrix, chunks[::-1]
    for j in chunks:
        kept = 1 if keep is None else keep[:, j, None]
        if reverse:
            before[:, :, j] = now
            now = torch.baddbmm(local[:, :, j], now, factor) * kept
        else:
            before[:, :, j] = now = now * kept
            now = torch.baddbmm(local[:, :, j], now, factor)
    return before, now


@_dense_scan.register_fake
def _(local: Tensor, matrix: Tensor, s: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    return local.new_empty(local.shape), s.new_empty(s.shape)


@_dense_scan_backward.register_fake
def _(
    d_before: Tensor, d_s: Tensor, before: Tensor, matrix: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_local = d_before.new_empty(d_before.shape)
    return d_local, matrix.new_empty(matrix.shape), d_s.new_empty(d_s.shape)


def _save_for_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], inputs[1], inputs[3])


def _backward_of_scan(ctx: Any, d_before: Tensor, d_s: Tensor) -> tuple[Tensor | None, ...]:
    before, matrix, keep = ctx.saved_tensors
    return *_dense_scan_backward(d_before, d_s, before, matrix, keep), None


_dense_scan.register_autograd(_backward_of_scan, setup_context=_save_for_scan)


@register_flop_formula(torch.ops.longspan.dense_scan)
def _dense_scan_flops(local: torch.Size, *shapes: Any, **others: Any) -> int:
    return 2 * math.prod(local) * local[-1]


def nplr_ssm_naive(
    u: Tensor,
    parameters: NPLRParameters,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Dense A, linear solves, and the recurrence token by token: the definition.

    Signature of `nplr_ssm`.
    """
    del chunk_size
    with no_autocast(u):
        dtype = wide_dtype(u)
        p = NPLRParameters(*(part.to(dtype) for part in parameters))
        decay, turn = torch.diag_embed(-p.log_A_real.exp()), torch.diag_embed(p.A_imag)
        rows = (torch.cat([decay, -turn], -1), torch.cat([turn, decay], -1))
        q, b, c = (part.transpose(1, 2).flatten(1) for part in (p.P, p.B, p.C))
        # p p^* on a conjugate pair (s, conj s) is 2 p Re(p^* s).
        a = torch.cat(rows, -2) - 2 * q.unsqueeze(-1) * q.unsqueeze(-2)
        half = a * p.log_dt.exp()[:, None, None] / 2
        eye = torch.eye(q.shape[-1], dtype=dtype, device=u.device)
        step = torch.linalg.solve(eye - half, eye + half)
        b = torch.linalg.solve(eye - half, p.log_dt.exp().unsqueeze(-1) * b)
        re, im = c.chunk(2, -1)
        c = 2 * torch.cat([re, -im], -1)
        s = b.new_zeros(u.shape[0], *b.shape) if state is None else state.to(dtype).flatten(2)
        outputs = []
        for t, x in enumerate(u.to(dtype).unbind(1)):
            if resets is not None and t in edges:
                s = s * ~resets[:, edges.index(t), None, None]
            s = torch.einsum("dmn,bdn->bdm", step, s) + b * x.unsqueeze(-1)
            outputs.append((c * s).sum(-1) + p.D * x)
    return torch.stack(outputs, 1).to(u.dtype), s.unflatten(-1, (2, -1))
