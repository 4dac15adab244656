"""Triton kernels of `short_convolution`: all that lies in memory is read once and written once.

Shapes: B batch, T time, D channels, K taps.

A program has some tokens of some channels and reads them once per tap, of which all but the first
come from the cache. The backward forms the convolution again, at K tokens for each: that of token p
goes on to tokens p .. p + K - 1.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 16, 128  # of a tile
TILES = 16  # per program of the backward, which adds up what weights receive from them


@triton.jit
def _inputs(x, front, token, lane, here, length, channels, token_stride, K: tl.constexpr):
    """Those of tokens (TOKENS,), of which -(K - 1) .. -1 came before this call; others are zero."""
    now = ((token >= 0) & (token < length))[:, None] & here
    before = ((token < 0) & (token > -K))[:, None] & here
    value = tl.load(x + token[:, None] * token_stride + lane[None, :], now, 0.0)
    earlier = tl.load(front + (token + K - 1)[:, None] * channels + lane[None, :], before, 0.0)
    return tl.where(now, value, earlier)


@triton.jit
def _convolution(
    x,
    front,
    weight,
    bias,
    starts,
    token,
    lane,
    here,
    length,
    channels,
    token_stride,
    WIDE: tl.constexpr,
    K: tl.constexpr,
):
    """At tokens (TOKENS,), and where each's document begins."""
    is_token = (token >= 0) & (token < length)
    start = tl.full([token.shape[0]], -K, tl.int64)
    if starts is not None:
        start = tl.load(starts + token, is_token, 0)
    y = tl.load(bias + lane, here, 0.0)[None, :] + tl.zeros([token.shape[0], lane.shape[0]], WIDE)
    for lag in tl.static_range(K):
        seen = _inputs(x, front, token - lag, lane, here, length, channels, token_stride, K).to(
            WIDE
        )
        if lag > 0:
            seen = tl.where((token - lag >= start)[:, None], seen, 0.0)
        y += seen * tl.load(weight + lane * K + K - 1 - lag, here, 0.0)[None, :]
    return y, start


@triton.jit
def _forward(
    x,
    front,
    weight,
    bias,
    starts,
    y,
    length,
    channels,
    lane_stride,
    token_stride,
    WIDE: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    lane_of_batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    lane = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = lane < channels
    x += lane_of_batch * lane_stride
    front += lane_of_batch * (K - 1) * channels
    if starts is not None:
        starts += lane_of_batch * length
    value, _ = _convolution(
        x, front, weight, bias, starts, token, lane, here, length, channels, token_stride, WIDE, K
    )
    value = value / (1 + tl.exp(-value))
    place = (lane_of_batch * length + token)[:, None] * channels + lane[None, :]
    tl.store(y + place, value.to(y.dtype.element_ty), (token < length)[:, None] & here[None, :])


@triton.jit
def _backward(
    dy,
    x,
    front,
    weight,
    bias,
    starts,
    dx,
    d_front,
    received,
    length,
    channels,
    lane_stride,
    token_stride,
    WIDE: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    lane_of_batch = tl.program_id(2).to(tl.int64)
    lane = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = lane < channels
    x += lane_of_batch * lane_stride
    dy += lane_of_batch * length * channels
    dx += lane_of_batch * length * channels
    front += lane_of_batch * (K - 1) * channels
    d_front += lane_of_batch * (K - 1) * channels
    if starts is not None:
        starts += lane_of_batch * length
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, CHANNELS], WIDE)  # of each tap, and of the bias
    for tile in range(TILES):
        first = (tl.program_id(0) * TILES + tile) * TOKENS - (K - 1)
        token = first + tl.arange(0, TOKENS).to(tl.int64)
        d_token = tl.zeros([TOKENS, CHANNELS], WIDE)
        for lag in tl.static_range(K):
            later = token + lag
            value, start = _convolution(
                x,
                front,
                weight,
                bias,
                starts,
                later,
                lane,
                here,
                length,
                channels,
                token_stride,
                WIDE,
                K,
            )
            given = ((later >= 0) & (later < length))[:, None] & here[None, :]
            d = tl.load(dy + later[:, None] * channels + lane[None, :], given, 0.0).to(WIDE)
            sigmoid = 1 / (1 + tl.exp(-value))
            d *= sigmoid * (1 + value * (1 - sigmoid))
            if lag > 0:
                d = tl.where((token >= start)[:, None], d, 0.0)
            # What tap K - 1 - lag multiplies at `later` is the input at `token`.
            d_token += d * tl.load(weight + lane * K + K - 1 - lag, here, 0.0)[None, :]
            seen = _inputs(x, front, token, lane, here, length, channels, token_stride, K).to(WIDE)
            total += tl.where(row == K - 1 - lag, tl.sum(d * seen, 0)[None, :], 0.0)
            if lag == 0:
                total += tl.where(row == K, tl.sum(d, 0)[None, :], 0.0)
        now = ((token >= 0) & (token < length))[:, None] & here[None, :]
        narrow = dx.dtype.element_ty
        tl.store(dx + token[:, None] * channels + lane[None, :], d_token.to(narrow), now)
        before = (token < 0)[:, None] & here[None, :]
        place = (token + K - 1)[:, None] * channels + lane[None, :]
        tl.store(d_front + place, d_token.to(narrow), before)
    program = lane_of_batch * tl.num_programs(0) + tl.program_id(0)
    place = (program * (K + 1) + row) * channels + lane[None, :]
    tl.store(received + place, total, (row <= K) & here[None, :])


def convolve(
    x: Tensor, front: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None
) -> Tensor:
    """See `short_convolution.fused_short_convolution`."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    y = x.new_empty(x.shape)
    grid = triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS), batch
    given = (x, front, weight, bias, starts)
    with torch.cuda.device_of(x):
        _forward[grid](*given, y, length, channels, *x.stride()[:2], **_constants(weight, taps))
    return y


def convolve_backward(
    dy: Tensor, x: Tensor, front: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, front, weight and bias; dy contiguous."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    programs = triton.cdiv(length + taps - 1, TOKENS * TILES)
    dx, d_front = x.new_empty(x.shape), front.new_empty(front.shape)
    received = weight.new_empty(batch * programs, taps + 1, channels)
    grid = programs, triton.cdiv(channels, CHANNELS), batch
    given = (dy, x, front, weight, bias, starts)
    made = (dx, d_front, received)
    with torch.cuda.device_of(x):
        _backward[grid](
            *given,
            *made,
            length,
            channels,
            *x.stride()[:2],
            TILES=TILES,
            ROWS=triton.next_power_of_2(taps + 1),
            **_constants(weight, taps),
        )
    *d_weight, d_bias = received.sum(0)
    return dx, d_front, torch.stack(d_weight, 1), d_bias


def _constants(weight: Tensor, taps: int) -> dict[str, Any]:
    wide = tl.float64 if weight.dtype == torch.float64 else tl.float32
    return {"WIDE": wide, "K": taps, "TOKENS": TOKENS, "CHANNELS": CHANNELS}
