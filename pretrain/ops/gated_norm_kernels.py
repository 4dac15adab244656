"""Triton kernels of `gated_norm_linear`: everything read once and written once.

Shapes: M tokens, I inner width, G groups of W = I / G channels. One program of the backward has
several tokens of a group, and sums what the gains receive from them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # per program of the backward


@triton.jit
def _forward(
    y,
    z,
    gain,
    normed,
    width,
    groups,
    eps: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = lane < width
    at = row * width + lane
    gate = tl.load(z + at, inside, 0.0).to(WIDE)
    gated = tl.load(y + at, inside, 0.0).to(WIDE) * gate / (1 + tl.exp(-gate))
    scale = 1 / tl.sqrt(tl.sum(gated * gated, 0) / width + eps)
    g = tl.load(gain + row % groups * width + lane, inside, 0.0)
    tl.store(normed + at, (gated * scale * g).to(normed.dtype.element_ty), inside)


@triton.jit
def _backward(
    d_normed,
    y,
    z,
    gain,
    dy,
    dz,
    d_gain,
    normed,
    tokens,
    width,
    groups,
    eps: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    program, group, lane = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    is_lane = lane < width
    g = tl.load(gain + group * width + lane, is_lane, 0.0)
    received = tl.zeros([BLOCK], WIDE)
    for index in range(TOKENS):
        token = program * TOKENS + index
        inside = is_lane & (token < tokens)
        at = (token * groups + group) * width + lane
        d = tl.load(d_normed + at, inside, 0.0).to(WIDE)
        value = tl.load(y + at, inside, 0.0).to(WIDE)
        gate = tl.load(z + at, inside, 0.0).to(WIDE)
        sigmoid = 1 / (1 + tl.exp(-gate))
        silu = gate * sigmoid
        gated = value * silu
        scale = 1 / tl.sqrt(tl.sum(gated * gated, 0) / width + eps)
        unit = gated * scale
        tl.store(normed + at, (unit * g).to(normed.dtype.element_ty), inside)
        received += tl.where(inside, d * unit, 0.0)  # 1 / sqrt(0 + eps) behind the end
        d *= g
        d = (d - unit * (tl.sum(d * unit, 0) / width)) * scale
        tl.store(dy + at, (d * silu).to(dy.dtype.element_ty), inside)
        d_gate = d * value * (sigmoid + silu * (1 - sigmoid))
        tl.store(dz + at, d_gate.to(dz.dtype.element_ty), inside)
    tl.store(d_gain + (program * groups + group) * width + lane, received, is_lane)


def gated_norm_forward(y: Tensor, z: Tensor, gain: Tensor, groups: int, eps: float) -> Tensor:
    """`gated_norm` of contiguous y and z (..., I), in the dtype of z."""
    normed, width = torch.empty_like(z), z.shape[-1] // groups
    with torch.cuda.device_of(z):
        _forward[(z.numel() // width,)](
            y, z, gain.contiguous(), normed, width, groups, eps, **_tile(z, width)
        )
    return normed


def gated_norm_backward(
    d_normed: Tensor, y: Tensor, z: Tensor, gain: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, z and gain, and `gated_norm` again; all (..., I) contiguous."""
    tokens, width = z.numel() // z.shape[-1], z.shape[-1] // groups
    programs = triton.cdiv(tokens, TOKENS)
    dy, dz, normed = torch.empty_like(y), torch.empty_like(z), torch.empty_like(z)
    # Of each program, and then of all: a sum in an order that does not change.
    d_gain = gain.new_empty(programs, gain.numel())
    with torch.cuda.device_of(z):
        _backward[(programs, groups)](
            d_normed,
            y,
            z,
            gain.contiguous(),
            dy,
            dz,
            d_gain,
            normed,
            tokens,
            width,
            groups,
            eps,
            TOKENS=TOKENS,
            **_tile(z, width),
        )
    return dy, dz, d_gain.sum(0), normed


def _tile(z: Tensor, width: int) -> dict[str, int | tl.dtype]:
    """A row of a group in one program: 8 values for each thread."""
    block = triton.next_power_of_2(width)
    return {
        "WIDE": tl.float64 if z.dtype == torch.float64 else tl.float32,
        "BLOCK": block,
        "num_warps": min(16, max(1, block // 256)),
    }
