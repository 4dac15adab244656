"""Triton kernels that form the matrix of `ssm_chunks` from modes, and their gradients from its.

    M = [ T      W_in ]     C rows, of tokens         T[j, i] = taps[i - j], 0 above the diagonal
        [ W_out  A    ]     2N rows, of the state     taps[t] = sum_n 2 Re(c z^t), D added at 0

Shapes: D channels, C chunk size, N complex modes as (re, im) pairs.

One program per channel does it all, in the dtype of the products: composed in torch the same takes
some 150 small kernels and writes everything in fp32 first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_TILE, BACKWARD_TILE = 16, 32  # tokens at a time; each the faster on an H100


@triton.jit
def _power(decay, angle, t):
    """z^t."""
    magnitude = tl.exp(decay * t)
    return magnitude * tl.cos(angle * t), magnitude * tl.sin(angle * t)


@triton.jit
def _times(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _form(
    decay,
    angle,
    c_re,
    c_im,
    skip,
    matrix,
    chunk_decay,
    taps,
    size,
    modes,
    MODES: tl.constexpr,
    TILE: tl.constexpr,
):
    channel, row = tl.program_id(0).to(tl.int64), size + 2 * modes
    rows, n = tl.arange(0, TILE), tl.arange(0, MODES)
    is_mode = n < modes
    at = channel * modes + n
    a, w = tl.load(decay + at, is_mode, 0.0), tl.load(angle + at, is_mode, 0.0)
    x, y = 2 * tl.load(c_re + at, is_mode, 0.0), 2 * tl.load(c_im + at, is_mode, 0.0)
    own, taps = matrix + channel * row * row, taps + channel * size
    narrow = matrix.dtype.element_ty

    re, im = _power(a, w, size)
    tl.store(chunk_decay + at * 2, re, is_mode)
    tl.store(chunk_decay + at * 2 + 1, im, is_mode)

    z_re, z_im = _power(a[None, :], w[None, :], 1.0)
    step_re, step_im = _power(a[None, :], w[None, :], TILE)
    re, im = _power(a[None, :], w[None, :], rows.to(a.dtype)[:, None])  # z^t
    for top in range(0, size, TILE):
        t = top + rows
        inside = (t < size)[:, None] & is_mode[None, :]
        tap = tl.sum(x[None, :] * re - y[None, :] * im, 1)
        tap += tl.where(t == 0, tl.load(skip + channel), 0.0)
        tl.store(taps + t, tap, t < size)
        # Token i of a chunk has decayed C - 1 - i times at its end.
        place = own + (size - 1 - t)[:, None] * row + size + n[None, :] * 2
        place = place[:, :, None] + tl.arange(0, 2)[None, None, :]
        tl.store(place, tl.join(re, im).to(narrow), inside[:, :, None])
        next_re, next_im = _times(re, im, z_re, z_im)
        out_re, out_im = _times(next_re, next_im, x[None, :], y[None, :])
        place = own + (size + 2 * n)[None, :] * row + t[:, None]
        tl.store(place, out_re.to(narrow), inside)
        tl.store(place + row, (-out_im).to(narrow), inside)
        re, im = _times(re, im, step_re, step_im)

    tl.debug_barrier()  # other threads of this program read the taps
    for top in range(0, size, TILE):
        j = top + rows
        for left in range(0, size, TILE):
            i = left + rows
            here = (j < size)[:, None] & (i < size)[None, :]
            back = i[None, :] - j[:, None]
            value = tl.load(taps + back, here & (back >= 0), 0.0)
            tl.store(own + j[:, None] * row + i[None, :], value.to(narrow), here)


@triton.jit
def _form_backward(
    d_matrix,
    decay,
    angle,
    c_re,
    c_im,
    d_decay,
    d_angle,
    d_c_re,
    d_c_im,
    d_skip,
    size,
    modes,
    MODES: tl.constexpr,
    TILE: tl.constexpr,
):
    """What z^t gets, times its conjugate, is what log z^t = t (decay + i angle) gets."""
    channel, row = tl.program_id(0).to(tl.int64), size + 2 * modes
    rows, n = tl.arange(0, TILE), tl.arange(0, MODES)
    is_mode = n < modes
    at = channel * modes + n
    a, w = tl.load(decay + at, is_mode, 0.0), tl.load(angle + at, is_mode, 0.0)
    x, y = 2 * tl.load(c_re + at, is_mode, 0.0), 2 * tl.load(c_im + at, is_mode, 0.0)
    own = d_matrix + channel * row * row

    z_re, z_im = _power(a[None, :], w[None, :], 1.0)
    step_re, step_im = _power(a[None, :], w[None, :], TILE)
    re, im = _power(a[None, :], w[None, :], rows.to(a.dtype)[:, None])  # z^t
    d_x, d_y = tl.zeros_like(re), tl.zeros_like(re)
    d_a, d_w = tl.zeros_like(re), tl.zeros_like(re)
    for top in range(0, size, TILE):
        t = top + rows
        inside = (t < size)[:, None] & is_mode[None, :]
        d_tap = tl.zeros([TILE], a.dtype)  # sums along diagonals of T
        for first in range(0, size - top, TILE):
            j = first + rows
            here = j[:, None] + t[None, :] < size
            d_tap += tl.sum(tl.load(own + j[:, None] * (row + 1) + t[None, :], here, 0.0), 0)
        tl.store(d_skip + channel + t, d_tap, t == 0)

        # taps and W_in, which hold z^t
        place = own + (size - 1 - t)[:, None] * row + size + n[None, :] * 2
        place = place[:, :, None] + tl.arange(0, 2)[None, None, :]
        in_re, in_im = tl.split(tl.load(place, inside[:, :, None], 0.0))
        d_tap = d_tap[:, None]
        d_x += d_tap * re
        d_y -= d_tap * im
        log_re, log_im = _times(re, -im, in_re + d_tap * x[None, :], in_im - d_tap * y[None, :])
        d_a += t[:, None] * log_re
        d_w += t[:, None] * log_im

        # W_out, which holds 2 c z^(t + 1)
        place = own + (size + 2 * n)[None, :] * row + t[:, None]
        out_re, out_im = tl.load(place, inside, 0.0), -tl.load(place + row, inside, 0.0)
        next_re, next_im = _times(re, im, z_re, z_im)
        log_re, log_im = _times(next_re, -next_im, out_re, out_im)
        d_x += log_re
        d_y += log_im
        log_re, log_im = _times(log_re, log_im, x[None, :], -y[None, :])
        d_a += (t + 1)[:, None] * log_re
        d_w += (t + 1)[:, None] * log_im
        re, im = _times(re, im, step_re, step_im)

    # A, whose blocks [[re, im], [-im, re]] hold z^C
    re, im = _power(a, w, size)
    place = own + (size + 2 * n) * (row + 1)
    g_re = tl.load(place, is_mode, 0.0) + tl.load(place + row + 1, is_mode, 0.0)
    g_im = tl.load(place + 1, is_mode, 0.0) - tl.load(place + row, is_mode, 0.0)
    log_re, log_im = _times(re, -im, g_re, g_im)
    tl.store(d_decay + at, tl.sum(d_a, 0) + size * log_re, is_mode)
    tl.store(d_angle + at, tl.sum(d_w, 0) + size * log_im, is_mode)
    tl.store(d_c_re + at, 2 * tl.sum(d_x, 0), is_mode)
    tl.store(d_c_im + at, 2 * tl.sum(d_y, 0), is_mode)


def form_matrix(
    decay: Tensor,
    angle: Tensor,
    c_re: Tensor,
    c_im: Tensor,
    skip: Tensor,
    size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """M of z = exp(decay + i angle), for products.

    Args:
        decay: (D, N), in at least fp32 like all others.
        angle: (D, N).
        c_re: (D, N).
        c_im: (D, N).
        skip: (D,), added to the first tap.
        size: C.
        dtype: of M.

    Returns:
        M (D, C + 2N, C + 2N), whose corner A is left as it was in memory, since a scan stands for
        that product; z^C (D, N, 2), with which it scans, in the dtype of `decay`.
    """
    channels, modes = decay.shape
    matrix = decay.new_empty(channels, size + 2 * modes, size + 2 * modes, dtype=dtype)
    chunk_decay, taps = decay.new_empty(channels, modes, 2), decay.new_empty(channels, size)
    given = [part.contiguous() for part in (decay, angle, c_re, c_im, skip)]
    made = [matrix, chunk_decay, taps]
    blocks = {"MODES": triton.next_power_of_2(modes), "TILE": FORWARD_TILE}
    _form[(channels,)](*given, *made, size, modes, **blocks, num_warps=4)
    return matrix, chunk_decay


def gradients_of_modes(
    d_matrix: Tensor, decay: Tensor, angle: Tensor, c_re: Tensor, c_im: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of M in at least fp32, its corner included, to those of decay, angle,
    c_re, c_im, (D, N) each, and skip (D,)."""
    (channels, modes), size = decay.shape, d_matrix.shape[1] - 2 * decay.shape[1]
    given = [part.contiguous() for part in (d_matrix, decay, angle, c_re, c_im)]
    d_decay, d_angle, d_re, d_im = (decay.new_empty(channels, modes) for _ in range(4))
    found = (d_decay, d_angle, d_re, d_im, decay.new_empty(channels))
    blocks = {"MODES": triton.next_power_of_2(modes), "TILE": BACKWARD_TILE}
    _form_backward[(channels,)](*given, *found, size, modes, **blocks, num_warps=4)
    return found
