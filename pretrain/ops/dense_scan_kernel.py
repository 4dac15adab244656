"""Triton kernel of the scan over chunks of `nplr_ssm`, whose decay is a matrix per channel.

Shapes: B batch, D channels, J chunks, M words of state.

A program keeps a channel's matrix and the states of ROWS sequences in registers; of each chunk it
reads one row per sequence and writes one. In torch a step is two launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# What a program keeps of wider matrices leaves too few registers.
WIDEST = 64
ROWS = 16


@triton.jit(do_not_specialize=["batch", "chunks", "width"])
def _scan(
    local,
    matrix,
    start,
    keep,
    before,
    last,
    batch,
    chunks,
    width,
    REVERSE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    d, b = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, WIDTH)
    down, across = n[:, None], n[None, :]
    inside = (down < width) & (across < width)
    factor = tl.load(matrix + d * width * width + down * width + across, inside, 0.0)
    live = (b < batch)[:, None] & (across < width)
    sequence = d * batch + b
    s = tl.load(start + sequence[:, None] * width + across, live, 0.0)
    place = sequence[:, None] * chunks * width + across
    flags = keep + b.to(tl.int64) * chunks if HAS_KEEP else keep
    x = tl.load(local + place + (chunks - 1 if REVERSE else 0) * width, live, 0.0)
    for step in range(chunks):
        j = chunks - 1 - step if REVERSE else step
        # Ahead of the store, behind which it would wait.
        following = j - 1 if REVERSE else j + 1
        here = live & (step + 1 < chunks)
        next_x = tl.load(local + place + following * width, here, 0.0)
        kept = 1.0
        if HAS_KEEP:
            kept = tl.load(flags + j, b < batch, 1).to(s.dtype)[:, None]
        if not REVERSE:
            s = s * kept
        tl.store(before + place + j * width, s, live)
        s = tl.dot(s, factor, input_precision="ieee", out_dtype=s.dtype) + x
        if REVERSE:
            s = s * kept
        x = next_x
    tl.store(last + sequence[:, None] * width + across, s, live)


def scan_into(
    local: Tensor,
    matrix: Tensor,
    s: Tensor,
    keep: Tensor | None,
    before: Tensor,
    *,
    reverse: bool,
) -> Tensor:
    """`pretrain.ops.chunk_scan.scan_into` with matrices, by a kernel.

    Args:
        local: (D, B, J, M) fp32.
        matrix: (D, M, M), M at most `WIDEST`.
        s: (D, B, M).
        keep: (B, J) bool.
        before: like `local`, contiguous; filled here.
        reverse: the adjoint.

    Returns:
        The state after the last chunk, like `s`; in reverse its gradient before the first.
    """
    last = torch.empty_like(s, memory_format=torch.contiguous_format)
    channels, batch, chunks, width = local.shape
    rows = min(ROWS, triton.next_power_of_2(batch))
    padded = max(16, triton.next_power_of_2(width))  # Triton's products have 16 terms at least
    _scan[channels, triton.cdiv(batch, rows)](
        local.contiguous(),
        # States are rows, so that M s is s M^T. Turned here: turned where it is read, a step of
        # the scan takes three times as long.
        (matrix if reverse else matrix.mT).contiguous(),
        s.contiguous(),
        keep if keep is None else keep.contiguous(),
        before,
        last,
        batch,
        chunks,
        width,
        REVERSE=reverse,
        HAS_KEEP=keep is not None,
        ROWS=rows,
        WIDTH=padded,
        num_warps=min(8, max(1, rows * padded // 128)),
    )
    return last
