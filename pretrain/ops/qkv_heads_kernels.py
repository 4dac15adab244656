"""Triton kernels of `prepare_qkv`: each part of the joined projection read once and written once.

Shapes: B batch, T time, P parts, H heads, K head width; n last tokens. One program has the heads of
one token, the halves of a head apart, because a rotation turns element j against element j + K / 2.
The backward's programs have several tokens, and sum what the scales of the heads receive from them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.ops import normalization
from pretrain.ops.flash_window_attention import SUMMED_WIDTH

TINY = tl.constexpr(normalization.TINY)
TOKENS = 4  # per program of the backward


@triton.jit
def _place_in_sum(t, lane):
    """Of channel `lane` < 64 of token t in what FlashAttention-4 adds up for a head of 128 channels
    on Hopper; channel `lane` + 64 lies 64 * 64 further on.

    It is the order of registers (PTX: the matrix fragment D of wgmma). A tile of 64 tokens and 64
    channels is of 128 threads, which write four registers each at a time: two channels side by side
    of a token, and of the token 8 behind it.
    """
    row = t % 64
    thread = row // 16 * 32 + row % 8 * 4 + lane // 2 % 4
    return t // 64 * (64 * 128) + lane // 8 * 512 + thread * 4 + row // 8 % 2 * 2 + lane % 2


@triton.jit
def _forward(
    x,
    y,
    scale,
    cos,
    sin,
    length,
    x_stride,
    heads: tl.constexpr,
    half: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    ROTATE: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0)
    t, token = token % length, token.to(tl.int64)
    head, lane = tl.arange(0, HEADS), tl.arange(0, HALF)
    inside = (head < heads)[:, None] & (lane < half)[None, :]
    at = head[:, None] * (2 * half) + lane[None, :]
    a = tl.load(x + token * x_stride + at, inside, 0.0).to(WIDE)
    b = tl.load(x + token * x_stride + half + at, inside, 0.0).to(WIDE)
    if NORMALIZE:
        factor = 1 / tl.maximum(tl.sqrt(tl.sum(a * a + b * b, 1)), TINY)
        if SCALE:
            factor *= tl.load(scale + head, head < heads, 0.0).to(WIDE)
        a *= factor[:, None]
        b *= factor[:, None]
    if ROTATE:
        angle = t.to(tl.int64) * half + lane
        c = tl.load(cos + angle, lane < half, 0.0)[None, :]
        s = tl.load(sin + angle, lane < half, 0.0)[None, :]
        turned = a * c - b * s
        b = b * c + a * s
        a = turned
    target = y + token * (2 * half * heads) + at
    tl.store(target, a.to(y.dtype.element_ty), inside)
    tl.store(target + half, b.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    d_y,
    d_last,
    x,
    d_x,
    scale,
    d_scale,
    cos,
    sin,
    summed_times,
    tokens,
    length,
    first,
    x_stride,
    y_stride_b,
    y_stride_t,
    y_stride_h,
    last_stride_b,
    last_stride_t,
    last_stride_h,
    heads: tl.constexpr,
    half: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    ROTATE: tl.constexpr,
    LAST: tl.constexpr,
    SUMMED: tl.constexpr,
    WIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program = tl.program_id(0)
    head, lane = tl.arange(0, HEADS), tl.arange(0, HALF)
    exists = (head < heads)[:, None] & (lane < half)[None, :]
    at = head[:, None] * (2 * half) + lane[None, :]
    received = tl.zeros([HEADS], WIDE)
    for index in tl.static_range(TOKENS):
        token = program * TOKENS + index
        if SUMMED:  # pairs that lie beside each other there: 0, 1, 8, 9 of 16; 2, 3, 10, 11; ...
            token = program // 4 * 16 + program % 4 * 2 + index % 2 + index // 2 * 8
        inside = exists & (token < tokens)
        # Divided as 32 bits, multiplied as 64.
        row, t, token = (token // length).to(tl.int64), token % length, token.to(tl.int64)
        t = t.to(tl.int64)
        source = d_y + row * y_stride_b + head[:, None].to(tl.int64) * y_stride_h
        if SUMMED:
            source += _place_in_sum(t, lane)[None, :]
            a = tl.load(source, inside, 0.0) * summed_times
            b = tl.load(source + 64 * 64, inside, 0.0) * summed_times
        else:
            source += t * y_stride_t + lane[None, :]
            a = tl.load(source, inside, 0.0).to(WIDE)
            b = tl.load(source + half, inside, 0.0).to(WIDE)
        if ROTATE:
            angle = t * half + lane
            c = tl.load(cos + angle, lane < half, 0.0)[None, :]
            s = tl.load(sin + angle, lane < half, 0.0)[None, :]
            turned = a * c + b * s
            b = b * c - a * s
            a = turned
        if NORMALIZE:
            x_a = tl.load(x + token * x_stride + at, inside, 0.0).to(WIDE)
            x_b = tl.load(x + token * x_stride + half + at, inside, 0.0).to(WIDE)
            factor = 1 / tl.maximum(tl.sqrt(tl.sum(x_a * x_a + x_b * x_b, 1)), TINY)
            along = tl.sum(x_a * a + x_b * b, 1) * factor
            received += along
            along *= factor
            if SCALE:
                factor *= tl.load(scale + head, head < heads, 0.0).to(WIDE)
            a = (a - x_a * along[:, None]) * factor[:, None]
            b = (b - x_b * along[:, None]) * factor[:, None]
        if LAST:  # the last tokens have been handed out as they are, too
            also = inside & (t >= first)
            source = d_last + row * last_stride_b + (t - first) * last_stride_t
            source += head[:, None].to(tl.int64) * last_stride_h + lane[None, :]
            a += tl.load(source, also, 0.0).to(WIDE)
            b += tl.load(source + half, also, 0.0).to(WIDE)
        target = d_x + token * x_stride + at
        tl.store(target, a.to(d_x.dtype.element_ty), inside)
        tl.store(target + half, b.to(d_x.dtype.element_ty), inside)
    if SCALE:
        tl.store(d_scale + program.to(tl.int64) * heads + head, received, head < heads)


def prepare_heads_forward(
    qkv: Tensor,
    part: int,
    scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    normalize: bool,
) -> Tensor:
    """Normalised (where asked), scaled (then only) and rotated heads (where there are angles).

    Args:
        qkv: (B, T, P, H, K), contiguous.
        part: which of P.
        scale: (H,).
        cos: contiguous, T x K / 2 elements in at least fp32.
        sin: like `cos`.
        normalize: divide by the L2 norm.

    Returns:
        (B, T, H, K), contiguous, computed in at least fp32.
    """
    batch, length, parts, heads, width = qkv.shape
    y = qkv.new_empty(batch, length, heads, width)
    with torch.cuda.device_of(qkv):
        _forward[(batch * length,)](
            qkv[:, :, part],
            y,
            scale,
            cos,
            sin,
            length,
            parts * heads * width,
            NORMALIZE=normalize,
            SCALE=scale is not None,
            ROTATE=cos is not None,
            **_tile(qkv),
        )
    return y


def prepare_heads_backward(
    d_y: Tensor,
    d_last: Tensor | None,
    qkv: Tensor,
    d_qkv: Tensor,
    part: int,
    scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    normalize: bool,
    summed_times: float | None = None,
) -> Tensor | None:
    """Fills a part of `d_qkv`, like `qkv`; returns the gradient (H,) of `scale`, in at least fp32.

    `d_y` (B, T, H, K) and `d_last` (B, n, H, K), what the last tokens of the part receive besides,
    have the elements of a head beside each other. With `summed_times`, `d_y` is FlashAttention-4's
    sum of `write_gradients`, and this its factor. For the rest see `prepare_heads_forward`.
    """
    batch, length, parts, heads, width = qkv.shape
    summed = summed_times is not None
    assert not summed or width == SUMMED_WIDTH
    programs = triton.cdiv(batch * length, 16) * (16 // TOKENS)
    y_strides = (d_y.stride(0), 0, d_y.stride(1)) if summed else d_y.stride()[:3]
    # Of each program, and then of all: a sum in an order that does not change.
    d_scale = None
    if scale is not None:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        d_scale = torch.empty(programs, heads, dtype=wide, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _backward[(programs,)](
            d_y,
            d_last,
            qkv[:, :, part],
            d_qkv[:, :, part],
            scale,
            d_scale,
            cos,
            sin,
            summed_times,
            batch * length,
            length,
            length if d_last is None else length - d_last.shape[1],
            parts * heads * width,
            *y_strides,
            *((0, 0, 0) if d_last is None else d_last.stride()[:3]),
            NORMALIZE=normalize,
            SCALE=scale is not None,
            ROTATE=cos is not None,
            LAST=d_last is not None,
            SUMMED=summed,
            TOKENS=TOKENS,
            **_tile(qkv),
        )
    return None if d_scale is None else d_scale.sum(0)


def _tile(qkv: Tensor) -> dict[str, int | tl.dtype]:
    """What the heads of a token need: 8 values of a half for each thread."""
    heads, half = qkv.shape[3], qkv.shape[4] // 2
    tile = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    return {
        "heads": heads,
        "half": half,
        "WIDE": tl.float64 if qkv.dtype == torch.float64 else tl.float32,
        "HEADS": tile[0],
        "HALF": tile[1],
        "num_warps": min(8, max(1, tile[0] * tile[1] // 256)),
    }
