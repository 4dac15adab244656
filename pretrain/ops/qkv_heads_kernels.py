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

TINY = tl.constexpr(normalization.TINY)
TOKENS = 4  # per program of the backward


@triton.jit
def turned_back(a, b, cos, sin, at, exists):
    """The gradients of a head's halves in front of the rotation by the angles `at`."""
    c = tl.load(cos + at, exists, 0.0)
    s = tl.load(sin + at, exists, 0.0)
    return a * c + b * s, b * c - a * s


@triton.jit
def before_norm(a, b, x_a, x_b, scale):
    """The gradients of the halves in front of the norm of each row, and what its scale receives."""
    factor = 1 / tl.maximum(tl.sqrt(tl.sum(x_a * x_a + x_b * x_b, 1)), TINY)
    received = tl.sum(x_a * a + x_b * b, 1) * factor
    along = (received * factor)[:, None]
    factor = (factor * scale)[:, None]
    return (a - x_a * along) * factor, (b - x_b * along) * factor, received


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
        inside = exists & (token < tokens)
        # Divided as 32 bits, multiplied as 64.
        row, t, token = (token // length).to(tl.int64), token % length, token.to(tl.int64)
        t = t.to(tl.int64)
        source = d_y + row * y_stride_b + head[:, None].to(tl.int64) * y_stride_h
        source += t * y_stride_t + lane[None, :]
        a = tl.load(source, inside, 0.0).to(WIDE)
        b = tl.load(source + half, inside, 0.0).to(WIDE)
        if ROTATE:
            angle = (t * half + lane)[None, :]
            a, b = turned_back(a, b, cos, sin, angle, (lane < half)[None, :])
        if NORMALIZE:
            x_a = tl.load(x + token * x_stride + at, inside, 0.0).to(WIDE)
            x_b = tl.load(x + token * x_stride + half + at, inside, 0.0).to(WIDE)
            factor = tl.full([HEADS], 1.0, WIDE)
            if SCALE:
                factor = tl.load(scale + head, head < heads, 0.0).to(WIDE)
            a, b, more = before_norm(a, b, x_a, x_b, factor)
            received += more
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
) -> Tensor | None:
    """Fills a part of `d_qkv`, like `qkv`; returns the gradient (H,) of `scale`, in at least fp32.

    `d_y` (B, T, H, K) and `d_last` (B, n, H, K), what the last tokens of the part receive besides,
    have the elements of a head beside each other. For the rest see `prepare_heads_forward`.
    """
    batch, length, parts, heads, width = qkv.shape
    programs = triton.cdiv(batch * length, TOKENS)
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
            batch * length,
            length,
            length if d_last is None else length - d_last.shape[1],
            parts * heads * width,
            *d_y.stride()[:3],
            *((0, 0, 0) if d_last is None else d_last.stride()[:3]),
            NORMALIZE=normalize,
            SCALE=scale is not None,
            ROTATE=cos is not None,
            LAST=d_last is not None,
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
