"""Triton kernels of `swiglu_linear`: everything read once and written once.

Shapes: M tokens, F hidden width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # of one row: 16 bytes for each of 128 threads, where F is a multiple of 8


@triton.jit
def _forward(gate_up, hidden, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    source = gate_up + row * 2 * width + at
    gate = tl.load(source, inside, 0.0).to(WIDE)
    up = tl.load(source + width, inside, 0.0).to(WIDE)
    y = gate / (1 + tl.exp(-gate)) * up
    tl.store(hidden + row * width + at, y.to(hidden.dtype.element_ty), inside)


@triton.jit
def _backward(d_hidden, gate_up, d_gate_up, hidden, width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    source = gate_up + row * 2 * width + at
    target = d_gate_up + row * 2 * width + at
    d = tl.load(d_hidden + row * width + at, inside, 0.0).to(WIDE)
    gate = tl.load(source, inside, 0.0).to(WIDE)
    up = tl.load(source + width, inside, 0.0).to(WIDE)
    sigmoid = 1 / (1 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = d * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(target, d_gate.to(d_gate_up.dtype.element_ty), inside)
    tl.store(target + width, (d * silu).to(d_gate_up.dtype.element_ty), inside)
    y = (silu * up).to(hidden.dtype.element_ty)
    tl.store(hidden + row * width + at, y, inside)


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, (..., F), of contiguous (..., 2F); computed in at least fp32."""
    width = gate_up.shape[-1] // 2
    hidden = gate_up.new_empty(*gate_up.shape[:-1], width)
    with torch.cuda.device_of(gate_up):
        _forward[_grid(hidden, width)](gate_up, hidden, width, WIDE=_wide(gate_up), BLOCK=BLOCK)
    return hidden


def swiglu_backward(d_hidden: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gate_up`, (..., 2F), and silu(gate) * up, (..., F), from contiguous ones."""
    width = gate_up.shape[-1] // 2
    d_gate_up, hidden = torch.empty_like(gate_up), torch.empty_like(d_hidden)
    with torch.cuda.device_of(gate_up):
        _backward[_grid(d_hidden, width)](
            d_hidden, gate_up, d_gate_up, hidden, width, WIDE=_wide(gate_up), BLOCK=BLOCK
        )
    return d_gate_up, hidden


def _grid(hidden: Tensor, width: int) -> tuple[int]:
    """One program per row and block; blocks of a row are neighbours."""
    return (hidden.numel() // width * triton.cdiv(width, BLOCK),)


def _wide(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
