"""Triton kernels: the scan over chunks of `chunk_scan`, and a transposing copy of tokens.

Shapes: B batch, D channels, J chunks of C tokens, N modes; complex ones are (re, im) pairs.

A lane of the scan is one mode of one sequence and channel: a multiply and an add per chunk, each
waiting for the one before. What costs is the latency of loads, which wait for nothing. Compilers do
not move a load before a store that may alias it, so all loads of STEPS chunks stand before the
first store.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 64
STEPS = 16
TILE = 64


@triton.jit
def _load(at, mask, WORDS: tl.constexpr):
    """Numbers as two words, (re, im), or as one."""
    if WORDS == 2:
        re, im = tl.split(tl.load(at[:, None] + tl.arange(0, 2)[None, :], mask[:, None], 0.0))
    else:
        re = tl.load(at, mask, 0.0)
        im = tl.zeros_like(re)
    return re, im


@triton.jit
def _store(at, re, im, mask, WORDS: tl.constexpr):
    if WORDS == 2:
        pairs = tl.join(re, im).to(at.dtype.element_ty)
        tl.store(at[:, None] + tl.arange(0, 2)[None, :], pairs, mask[:, None])
    else:
        tl.store(at, re.to(at.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["batch", "chunks", "lanes"])
def _scan(
    local,
    decay,
    start,
    keep,
    before,
    last,
    batch,
    chunks,
    modes,
    local_row,
    before_channel,
    before_row,
    lanes,
    WORDS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < lanes
    d, b, n = lane // (batch * modes), lane // modes % batch, lane % modes
    a_re, a_im = _load(decay + (d * modes + n) * WORDS, live, WORDS)
    if REVERSE:
        a_im = -a_im
    s_re, s_im = _load(start + lane.to(tl.int64) * WORDS, live, WORDS)
    d, row = d.to(tl.int64), b.to(tl.int64) * chunks
    source = local + (d * batch * chunks + row) * local_row + n * WORDS
    target = before + d * before_channel + row * before_row + n * WORDS
    for first in range(0, chunks, STEPS):
        x = ()
        for step in tl.static_range(STEPS):
            j = chunks - 1 - first - step if REVERSE else first + step
            here = live & (first + step < chunks)
            x_re, x_im = _load(source + j * local_row, here, WORDS)
            kept = 1.0
            if HAS_KEEP:
                kept = tl.load(keep + row + j, here, 1).to(s_re.dtype)
            x += ((x_re, x_im, kept),)  # type: ignore[assignment]
        for step in tl.static_range(STEPS):
            j = chunks - 1 - first - step if REVERSE else first + step
            here = live & (first + step < chunks)
            x_re, x_im, kept = x[step]
            if not REVERSE:
                s_re, s_im = s_re * kept, s_im * kept
            _store(target + j * before_row, s_re, s_im, here, WORDS)
            next_re = a_re * s_re - a_im * s_im + x_re
            next_im = a_re * s_im + a_im * s_re + x_im
            if REVERSE:
                next_re, next_im = next_re * kept, next_im * kept
            s_re, s_im = tl.where(here, next_re, s_re), tl.where(here, next_im, s_im)
    _store(last + lane.to(tl.int64) * WORDS, s_re, s_im, live, WORDS)


@triton.jit
def _transpose(
    source,
    target,
    length,
    channels,
    size,
    batch_stride,
    time_stride,
    channel_stride,
    target_channel,
    target_row,
    TILE: tl.constexpr,
):
    """A tile of TILE tokens and channels."""
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    d = tl.program_id(1) * TILE + tl.arange(0, TILE)
    b = tl.program_id(2).to(tl.int64)
    here = (t < length)[:, None] & (d < channels)[None, :]
    read = b * batch_stride + t.to(tl.int64)[:, None] * time_stride
    read += d.to(tl.int64)[None, :] * channel_stride
    tile = tl.trans(tl.load(source + read, here, 0.0))
    row = b * (length // size) + t // size
    place = d.to(tl.int64)[:, None] * target_channel + (row * target_row + t % size)[None, :]
    tl.store(target + place, tile, tl.trans(here))


def scan_chunks(
    local: Tensor,
    decay: Tensor,
    s: Tensor,
    keep: Tensor | None,
    before: Tensor,
    *,
    reverse: bool = False,
) -> Tensor:
    """`pretrain.ops.chunk_scan.scan_into` by a kernel; same arguments, and returns the same."""
    last = torch.empty_like(s, memory_format=torch.contiguous_format)
    batch, modes = s.shape[1:3]
    words = 2 if s.dim() == 4 else 1
    chunks, lanes = local.shape[1] // batch, s.numel() // words
    _scan[(triton.cdiv(lanes, LANES),)](
        local,
        decay.contiguous(),
        s.contiguous(),
        keep if keep is None else keep.contiguous(),
        before,
        last,
        batch,
        chunks,
        modes,
        local.stride(1),
        before.stride(0),
        before.stride(1),
        lanes,
        WORDS=words,
        REVERSE=reverse,
        HAS_KEEP=keep is not None,
        LANES=LANES,
        STEPS=min(STEPS, triton.next_power_of_2(chunks)),
        num_warps=2,
    )
    return last


def transpose_into(source: Tensor, target: Tensor) -> None:
    """source (B, T, D), of any strides -> target (D, B * T / C, C), innermost contiguous."""
    batch, length, channels = source.shape
    grid = (triton.cdiv(length, TILE), triton.cdiv(channels, TILE), batch)
    _transpose[grid](
        source,
        target,
        length,
        channels,
        target.shape[2],
        *source.stride(),
        target.stride(0),
        target.stride(1),
        TILE=TILE,
        num_warps=4,
    )
