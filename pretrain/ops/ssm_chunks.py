"""Whole chunks of a diagonal state-space model: one matrix per channel, and a scan.

    [Y | S'] = [X | H] M      M = [ T      W_in ]    T Toeplitz: the convolution inside a chunk
                                  [ W_out  A    ]    A: the state's decay over a chunk

X and Y are the chunks' inputs and outputs, H and S' the states before and behind them. A chunk's H
is the S' of the one before it, so a scan stands for A and three products for the rest:

    L = X W_in,  H = scan(L),  Y = [X | H] [T; W_out]

Backward, with dH = dY W_out^T and dL = scan(dH) from the right,

    dX = [dY | dL] [T | W_in]^T,  dM = [X | H]^T [dY | dL].

Shapes: B batch, T time, D channels, J = T / C chunks, C chunk size, N complex modes as (re, im)
pairs: X, Y (D, B * J, C), H, L (D, B * J, 2N), M (D, C + 2N, C + 2N).

X and H lie side by side in one buffer, as dY and dL do and the parts of M: nothing is joined. One
operator instead of a chain: the compiler generates no code for complex numbers, would unroll the
scan, and could not see that a single buffer serves both.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pretrain.ops.channel_rows import transpose_rows
from pretrain.ops.chunk_scan import scan_into


@torch.library.custom_op("longspan::ssm_chunks", mutates_args=())
def ssm_chunks(
    u: Tensor, matrix: Tensor, s: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs J chunks of C tokens.

    Args:
        u: (B, T, D); its dtype is that of the products' operands.
        matrix: M in at least fp32, A of blocks [[re, im], [-im, re]] on its diagonal.
        s: (D, B, N, 2), the state before the first chunk, in the dtype of `matrix`.
        keep: (B, J) bool, False where the state is zeroed before a chunk; None: nowhere.

    Returns:
        y (D, B, T) like `u`; the state after the last chunk, like `s`; [X | H], (D, B * J, C + 2N),
        which the backward needs.
    """
    with torch.cuda.device_of(u):
        return _forward(u, matrix.to(u.dtype), _decay(matrix, s.shape[2]), s, keep)


@torch.library.custom_op("longspan::ssm_chunks_backward", mutates_args=())
def _ssm_chunks_backward(
    d_y: Tensor, d_s: Tensor, rows: Tensor, matrix: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """d_y (D, B, T) -> gradients of u, as (D, B, T), of M and of s."""
    with torch.cuda.device_of(rows):
        decay = _decay(matrix, d_s.shape[2])
        return _backward(d_y, d_s, rows, matrix.to(rows.dtype), decay, keep)


@torch.library.custom_op("longspan::ssm_chunks_of_modes", mutates_args=())
def ssm_chunks_of_modes(
    u: Tensor,
    decay: Tensor,
    angle: Tensor,
    c_re: Tensor,
    c_im: Tensor,
    skip: Tensor,
    s: Tensor,
    keep: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ssm_chunks` with M formed by one kernel in the dtype of the products, on a GPU.

    Args:
        u: (B, T, D).
        decay: (D, N) of z = exp(decay + i angle), in at least fp32 like all others.
        angle: (D, N).
        c_re: (D, N) of y = 2 Re(c s) + skip u.
        c_im: (D, N).
        skip: (D,).
        s: (D, B, N, 2), the state before the first chunk.
        keep: (B, J) bool, False where the state is zeroed before a chunk; None: nowhere.
        size: C.

    Returns:
        What `ssm_chunks` returns, and for the backward M in the dtype of `u` and z^C.
    """
    from pretrain.ops.ssm_operator_kernels import form_matrix

    with torch.cuda.device_of(u):
        formed = form_matrix(decay, angle, c_re, c_im, skip, size, u.dtype)
        return *_forward(u, *formed, s, keep), *formed


@torch.library.custom_op("longspan::ssm_chunks_of_modes_backward", mutates_args=())
def _ssm_chunks_of_modes_backward(
    d_y: Tensor,
    d_s: Tensor,
    rows: Tensor,
    matrix: Tensor,
    chunk_decay: Tensor,
    keep: Tensor | None,
    decay: Tensor,
    angle: Tensor,
    c_re: Tensor,
    c_im: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, as (D, B, T), of decay, angle, c_re, c_im, skip and s."""
    from pretrain.ops.ssm_operator_kernels import gradients_of_modes

    with torch.cuda.device_of(rows):
        d_u, d_matrix, d_start = _backward(d_y, d_s, rows, matrix, chunk_decay, keep)
        return d_u, *gradients_of_modes(d_matrix, decay, angle, c_re, c_im), d_start


def _forward(
    u: Tensor, matrix: Tensor, chunk_decay: Tensor, s: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, channels), width = u.shape, 2 * s.shape[2]
    size = matrix.shape[1] - width
    rows = u.new_empty(channels, batch * (length // size), size + width)
    x, before = rows.split([size, width], 2)
    transpose_rows(u, x)
    local = _wide_product(x, matrix[:, :size, size:], s.dtype)
    last = scan_into(local, chunk_decay, s, keep, before)
    y = torch.bmm(rows, matrix[:, :, :size])
    return y.view(channels, batch, length), last, rows


def _backward(
    d_y: Tensor,
    d_s: Tensor,
    rows: Tensor,
    matrix: Tensor,
    chunk_decay: Tensor,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    width = 2 * d_s.shape[2]
    size = matrix.shape[1] - width
    d_rows = torch.empty_like(rows)
    d_out, d_local = d_rows.split([size, width], 2)
    transpose_rows(d_y.permute(1, 2, 0), d_out)
    d_before = _wide_product(d_out, matrix[:, size:, :size].mT, d_s.dtype)
    d_start = scan_into(d_before, chunk_decay, d_s, keep, d_local, reverse=True)
    d_u = torch.bmm(d_rows, matrix[:, :size].mT).view(d_y.shape)
    return d_u, _wide_product(rows.mT, d_rows, d_s.dtype), d_start


def _decay(matrix: Tensor, modes: int) -> Tensor:
    """(D, N, 2) from the blocks of A."""
    a = matrix[:, -2 * modes :, -2 * modes :]
    re, im = a[:, ::2, ::2].diagonal(0, 1, 2), a[:, ::2, 1::2].diagonal(0, 1, 2)
    return torch.stack([re, im], -1)


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed and returned in `dtype`."""
    if a.dtype != dtype and a.device.type == "cuda":
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a, b).to(dtype)


@ssm_chunks.register_fake
def _(u: Tensor, matrix: Tensor, s: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_outputs(u, matrix.shape[1] - 2 * s.shape[2], s)


@_ssm_chunks_backward.register_fake
def _(
    d_y: Tensor, d_s: Tensor, rows: Tensor, matrix: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty(d_y.shape), matrix.new_empty(matrix.shape), d_s.new_empty(d_s.shape)


@ssm_chunks_of_modes.register_fake
def _(
    u: Tensor,
    decay: Tensor,
    angle: Tensor,
    c_re: Tensor,
    c_im: Tensor,
    skip: Tensor,
    s: Tensor,
    keep: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels, modes = decay.shape
    matrix = u.new_empty(channels, size + 2 * modes, size + 2 * modes)
    return *_fake_outputs(u, size, s), matrix, decay.new_empty(channels, modes, 2)


@_ssm_chunks_of_modes_backward.register_fake
def _(
    d_y: Tensor,
    d_s: Tensor,
    rows: Tensor,
    matrix: Tensor,
    chunk_decay: Tensor,
    keep: Tensor | None,
    decay: Tensor,
    angle: Tensor,
    c_re: Tensor,
    c_im: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_decay, d_angle, d_re, d_im = (decay.new_empty(decay.shape) for _ in range(4))
    d_skip, d_u = decay.new_empty(decay.shape[0]), rows.new_empty(d_y.shape)
    return d_u, d_decay, d_angle, d_re, d_im, d_skip, d_s.new_empty(d_s.shape)


def _fake_outputs(u: Tensor, size: int, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, channels), modes = u.shape, s.shape[2]
    rows = u.new_empty(channels, batch * (length // size), size + 2 * modes)
    return u.new_empty(channels, batch, length), s.new_empty(s.shape), rows


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, matrix, s, keep = inputs
    ctx.save_for_backward(output[2], matrix, keep)
    _save_shapes(ctx, output[0], s)


def _save_modes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *modes, _, s, keep, _ = inputs
    ctx.save_for_backward(*output[2:], keep, *modes)
    _save_shapes(ctx, output[0], s)


def _save_shapes(ctx: Any, y: Tensor, s: Tensor) -> None:
    """No zeros in place of gradients that [X | H] and M never get: they are large."""
    ctx.set_materialize_grads(False)
    ctx.y_shape, ctx.s_shape, ctx.s_dtype = y.shape, s.shape, s.dtype


def _above(ctx: Any, d_y: Tensor | None, d_s: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    d_y = rows.new_zeros(ctx.y_shape) if d_y is None else d_y
    return d_y, rows.new_zeros(ctx.s_shape, dtype=ctx.s_dtype) if d_s is None else d_s


def _gradients(
    ctx: Any, d_y: Tensor | None, d_s: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # activation checkpoints unpack it once
    d_u, *others = _ssm_chunks_backward(*_above(ctx, d_y, d_s, saved[0]), *saved)
    return d_u.permute(1, 2, 0), *others, None


def _gradients_of_modes(
    ctx: Any, d_y: Tensor | None, d_s: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    d_u, *others = _ssm_chunks_of_modes_backward(*_above(ctx, d_y, d_s, saved[0]), *saved)
    return d_u.permute(1, 2, 0), *others, None, None


ssm_chunks.register_autograd(_gradients, setup_context=_save)
ssm_chunks_of_modes.register_autograd(_gradients_of_modes, setup_context=_save_modes)


@register_flop_formula(torch.ops.longspan.ssm_chunks)
def _flops(u: torch.Size, matrix: torch.Size, s: torch.Size, *_: Any, **others: Any) -> int:
    return _forward_flops(u, matrix[1] - 2 * s[2], s)


@register_flop_formula(torch.ops.longspan.ssm_chunks_of_modes)
def _flops_of_modes(u: torch.Size, *shapes: Any, **others: Any) -> int:
    *_, s, _, size = shapes
    return _forward_flops(u, size, s)


def _forward_flops(u: torch.Size, size: int, s: torch.Size) -> int:
    """L and Y."""
    width = 2 * s[2]
    return 2 * math.prod(u) * (width + size + width)


@register_flop_formula(
    [torch.ops.longspan.ssm_chunks_backward, torch.ops.longspan.ssm_chunks_of_modes_backward]
)
def _backward_flops(
    d_y: torch.Size, d_s: torch.Size, rows: torch.Size, *_: Any, **others: Any
) -> int:
    """dH and dX, then dM."""
    width = 2 * d_s[2]
    return 2 * math.prod(d_y) * (width + rows[2]) + 2 * math.prod(rows) * rows[2]
