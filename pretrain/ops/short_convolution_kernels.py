"""Triton kernels of `short_convolution`: all that lies in memory is read once and written once.

Shapes: B batch, T time, D channels, K taps.

A program walks along some tokens of some channels. What the last K tokens brought stays in
registers: inputs, for the convolution of those that follow; in the backward, too, what they have
received, since the gradient of token p goes to the inputs p - (K - 1) .. p. So each token's
convolution and its derivative are formed once, but for K - 1 tokens in front of a program's own.
Compilers do not move a load before a store that may alias it, so that of AHEAD tokens all loads
stand before the first store.
"""
# mypy: disable-error-code="assignment, var-annotated"
# Tuples grow: Triton has no lists.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, CHANNELS = 128, 256  # of a program
AHEAD = 4
WARPS = 2


@triton.jit
def _weights(weight, lane, here, K: tl.constexpr):
    """What multiplies the inputs 0 .. K - 1 tokens ago."""
    weights = ()
    for lag in tl.static_range(K):
        weights += (tl.load(weight + lane * K + K - 1 - lag, here, 0.0),)
    return weights


@triton.jit
def _past(x, front, token, here, channels, token_stride, WIDE: tl.constexpr, K: tl.constexpr):
    """The inputs 1 .. K tokens before `token`, at most T; -(K - 1) .. -1 came before this call."""
    past = ()
    for lag in tl.static_range(1, K + 1):
        at = token - lag
        now = tl.load(x + at * token_stride, here & (at >= 0), 0.0)
        before = here & (at < 0) & (at > -K)
        past += ((now + tl.load(front + (at + K - 1) * channels, before, 0.0)).to(WIDE),)
    return past


@triton.jit
def _start(starts, token, length):
    """Where the document of `token` begins, if there are several."""
    start = token
    if starts is not None:
        start = tl.load(starts + token, token < length, 0)
    return start


@triton.jit
def _within(value, lag, token, start, starts):
    """Zero where the token `lag` before `token` is another document's."""
    if starts is not None:
        value = tl.where(token - lag >= start, value, 0.0)
    return value


@triton.jit
def _seen(now, past, token, start, starts, K: tl.constexpr):
    """The inputs 0 .. K - 1 tokens ago."""
    seen = (now,)
    for lag in tl.static_range(1, K):
        seen += (_within(past[lag - 1], lag, token, start, starts),)
    return seen


@triton.jit
def _convolution(seen, weights, bias, K: tl.constexpr):
    y = bias
    for lag in tl.static_range(K):
        y += seen[lag] * weights[lag]
    return y


@triton.jit
def _shifted(first, others, K: tl.constexpr):
    """One tuple of K, without the last one."""
    shifted = (first,)
    for lag in tl.static_range(1, K):
        shifted += (others[lag - 1],)
    return shifted


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
    AHEAD: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    stop = tl.minimum(first + TOKENS, length)
    lane = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = lane < channels
    x += row * lane_stride + lane
    y += row * length * channels + lane
    front += row * (K - 1) * channels + lane
    if starts is not None:
        starts += row * length
    weights, shift = _weights(weight, lane, here, K), tl.load(bias + lane, here, 0.0)
    past = _past(x, front, first, here, channels, token_stride, WIDE, K)
    for at in range(first, stop, AHEAD):
        loaded = ()
        for ahead in tl.static_range(AHEAD):
            token = at + ahead
            loaded += (tl.load(x + token * token_stride, here & (token < stop), 0.0),)
        for ahead in tl.static_range(AHEAD):
            token, now = at + ahead, loaded[ahead].to(WIDE)
            seen = _seen(now, past, token, _start(starts, token, length), starts, K)
            value = _convolution(seen, weights, shift, K)
            value = value / (1 + tl.exp(-value))
            tl.store(y + token * channels, value.to(y.dtype.element_ty), here & (token < stop))
            past = _shifted(now, past, K)


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
    AHEAD: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    # Behind the last token K - 1 more: its input has received all then.
    stop = tl.minimum(first + TOKENS, length + K - 1)
    begin = tl.maximum(first - (K - 1), 0)
    lane = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    here = lane < channels
    x += row * lane_stride + lane
    dy += row * length * channels + lane
    dx += row * length * channels + lane
    front += row * (K - 1) * channels + lane
    d_front += row * (K - 1) * channels + lane
    if starts is not None:
        starts += row * length
    weights, shift = _weights(weight, lane, here, K), tl.load(bias + lane, here, 0.0)
    past = _past(x, front, begin, here, channels, token_stride, WIDE, K)
    zero = tl.zeros([CHANNELS], WIDE)
    owed, totals, d_bias = (), (), zero
    for _ in tl.static_range(K):
        owed += (zero,)  # to the inputs 0 .. K - 1 tokens before the present one
        totals += (zero,)
    narrow = dx.dtype.element_ty
    for at in range(begin, stop, AHEAD):
        loaded = ()
        for ahead in tl.static_range(AHEAD):
            token = at + ahead
            inside = here & (token < length)
            now = tl.load(x + token * token_stride, inside, 0.0)
            loaded += ((now, tl.load(dy + token * channels, inside, 0.0)),)
        for ahead in tl.static_range(AHEAD):
            token, now, d = at + ahead, loaded[ahead][0].to(WIDE), loaded[ahead][1].to(WIDE)
            start = _start(starts, token, length)
            seen = _seen(now, past, token, start, starts, K)
            value = _convolution(seen, weights, shift, K)
            sigmoid = 1 / (1 + tl.exp(-value))
            d *= sigmoid * (1 + value * (1 - sigmoid))
            mine = (token >= first) & (token < stop)
            own = tl.where(mine, d, 0.0)
            d_bias += own
            added, passed = (totals[0] + own * now,), (d * weights[0],)
            for lag in tl.static_range(1, K):
                added += (totals[lag] + own * seen[lag],)
                passed += (owed[lag - 1] + _within(d * weights[lag], lag, token, start, starts),)
            totals, owed = added, passed
            past = _shifted(now, past, K)
            done, full = token - (K - 1), owed[K - 1].to(narrow)
            tl.store(dx + done * channels, full, here & mine & (done >= 0))
            tl.store(d_front + token * channels, full, here & mine & (done < 0))
    program = row * tl.num_programs(0) + tl.program_id(0)
    received += program * (K + 1) * channels + lane
    for lag in tl.static_range(K):
        tl.store(received + (K - 1 - lag) * channels, totals[lag], here)
    tl.store(received + K * channels, d_bias, here)


def convolve(
    x: Tensor, front: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None
) -> Tensor:
    """See `short_convolution.fused_short_convolution`; all but x contiguous."""
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
    """The gradients of x, front, weight and bias; all but x contiguous."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    programs = triton.cdiv(length + taps - 1, TOKENS)
    dx, d_front = x.new_empty(x.shape), front.new_empty(front.shape)
    # Of each program, and then of all: a sum in an order that does not change.
    received = weight.new_empty(batch * programs, taps + 1, channels)
    grid = programs, triton.cdiv(channels, CHANNELS), batch
    given, made = (dy, x, front, weight, bias, starts), (dx, d_front, received)
    with torch.cuda.device_of(x):
        _backward[grid](
            *given, *made, length, channels, *x.stride()[:2], **_constants(weight, taps)
        )
    sums = received.sum(0)
    # Copies: compiled code takes every result for the beginning of its memory.
    return dx, d_front, sums[:taps].T.contiguous(), sums[taps].clone()


def _constants(weight: Tensor, taps: int) -> dict[str, Any]:
    return {
        "WIDE": tl.float64 if weight.dtype == torch.float64 else tl.float32,
        "K": taps,
        "TOKENS": TOKENS,
        "CHANNELS": CHANNELS,
        "AHEAD": AHEAD,
        "num_warps": WARPS,
    }
