"""Triton kernel that takes the gradient of the queries back through rotation and norm from the sums
of FlashAttention-4, without the pass that turns them into rows.

Shapes: B batch, T time, P parts, H heads of 128 channels.

On Hopper a tile of 64 tokens and 128 channels lies there in the order of registers (PTX: the matrix
fragment D of wgmma). A program has 16 of its tokens, the rows of one warp, and reads their pieces
of 128 numbers as they lie; its threads exchange them for rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.ops.flash_window_attention import SUMMED_WIDTH
from pretrain.ops.qkv_heads_kernels import before_norm, turned_back

TOKENS = tl.constexpr(16)  # per program
HALF = tl.constexpr(SUMMED_WIDTH // 2)


@triton.jit
def _rows(summed):
    """64 channels of a program's tokens, (16, 64): eight channels at a time, a piece has of every
    token t < 8 and pair of channels p the numbers (t, 2 p), (t, 2 p + 1), (t + 8, 2 p), ..."""
    channels, piece = tl.arange(0, 8)[:, None], tl.arange(0, 128)[None, :]
    found = tl.load(summed + channels * 512 + piece)
    found = tl.reshape(found, [8, 8, 4, 2, 2])  # channels by eight, t, p, t + 8, 2 p + 1
    return tl.reshape(tl.permute(found, [3, 1, 0, 2, 4]), [TOKENS, HALF])


@triton.jit
def _backward_of_sum(
    summed,
    x,
    d_x,
    scale,
    d_scale,
    cos,
    sin,
    times,
    length,
    x_stride,
    stride_b,
    stride_h,
    heads: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    ROTATE: tl.constexpr,
):
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, lane = group * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HALF)
    inside = (t < length)[:, None]
    at = (row * length + t)[:, None] * x_stride + lane[None, :]
    angle = t[:, None] * HALF + lane[None, :]
    summed += row * stride_b + (group // 4).to(tl.int64) * (64 * 128) + group % 4 * 128
    d_scale += (row * tl.num_programs(0) + group) * heads
    for head in range(heads):
        a = tl.where(inside, _rows(summed) * times, 0.0)  # nobody fills what is behind the end
        b = tl.where(inside, _rows(summed + 64 * 64) * times, 0.0)
        if ROTATE:
            a, b = turned_back(a, b, cos, sin, angle, inside)
        if NORMALIZE:
            x_a = tl.load(x + at, inside, 0.0).to(tl.float32)
            x_b = tl.load(x + HALF + at, inside, 0.0).to(tl.float32)
            factor = tl.load(scale + head) if SCALE else 1.0
            a, b, received = before_norm(a, b, x_a, x_b, factor)
            if SCALE:
                tl.store(d_scale + head, tl.sum(received, 0))
        tl.store(d_x + at, a.to(d_x.dtype.element_ty), inside)
        tl.store(d_x + HALF + at, b.to(d_x.dtype.element_ty), inside)
        summed += stride_h
        at += 2 * HALF


def prepare_heads_backward_of_sum(
    summed: Tensor,
    times: float,
    qkv: Tensor,
    d_qkv: Tensor,
    part: int,
    scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    normalize: bool,
) -> Tensor | None:
    """Fills a part of `d_qkv`, like `qkv`; returns the gradient (H,) of `scale`, in fp32.

    Args:
        summed: of `write_gradients`, (B, H, 128 * T rounded up to 64), fp32.
        times: the factor it is without.
        qkv: (B, T, P, H, 128), contiguous.
        d_qkv: like `qkv`.
        part: which of P.
        scale: (H,).
        cos: fp32, as in `prepare_heads_forward`.
        sin: likewise.
        normalize: likewise.
    """
    batch, length, parts, heads, width = qkv.shape
    assert width == SUMMED_WIDTH
    groups = triton.cdiv(length, TOKENS.value)
    # Of each program, and then of all: a sum in an order that does not change.
    d_scale = summed.new_empty(batch * groups, heads if scale is not None else 0)
    with torch.cuda.device_of(qkv):
        _backward_of_sum[groups, batch](
            summed,
            qkv[:, :, part],
            d_qkv[:, :, part],
            scale,
            d_scale,
            cos,
            sin,
            times,
            length,
            parts * heads * width,
            summed.stride(0),
            summed.stride(1),
            heads,
            NORMALIZE=normalize,
            SCALE=scale is not None,
            ROTATE=cos is not None,
            num_warps=4,
        )
    return None if scale is None else d_scale.sum(0)
