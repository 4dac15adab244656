"""Triton kernel of pretrain/ops/window_bias_gradient.py: gradients of scores, summed tile on tile.

Shapes: B batch, T queries, M cached keys in front of them, H heads, K head width, D diagonals of
tiles.

A program has one head and one diagonal of tiles and goes through a share of its tiles, in all rows
of the batch; what depends on the distance alone, the bias and a window's mask, it holds throughout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.ops.window_bias_gradient import Pairs

PROGRAMS = 1024  # enough to occupy a GPU evenly; each writes one tile
STAGED = 160 * 1024  # bytes of shared memory for what is fetched ahead: an A100 has 163 KiB


def tile_size(q: Tensor) -> int:
    """Queries and keys of a tile: what its warps hold in registers (sm_90; fp32 has no tensor cores
    of its precision)."""
    if q.element_size() == 2:
        return 64
    return 32 if q.shape[-1] <= 128 else 16


@triton.jit
def _tile_sums(
    q,
    k,
    v,
    d_y,
    lse,
    delta,
    bias,
    marks,
    sums,
    batch,
    length,
    cached,
    block_size,
    offset,
    distances,
    first_distance,
    first_diagonal,
    scale,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    d_b,
    d_t,
    d_h,
    lse_b,
    lse_t,
    lse_h,
    delta_b,
    delta_t,
    delta_h,
    marks_b,
    REACH: tl.constexpr,
    MARKED: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
):
    head, diagonal, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line, lane = tl.arange(0, TILE), tl.arange(0, LANES)
    tiles = tl.cdiv(length, TILE)
    keys = cached + length
    back = (first_diagonal + diagonal) * TILE + line[:, None] - line[None, :]
    place = back - first_distance
    near = (place >= 0) & (place < distances)
    if REACH == "window":
        near = near & (back < block_size)
    added = tl.load(bias + head * distances + place, near, 0.0)
    q += head * q_h
    k += head * k_h
    v += head * v_h
    d_y += head * d_h
    lse += head * lse_h
    delta += head * delta_h
    total = tl.zeros([TILE, TILE], tl.float32)
    q_at, d_at = line[:, None] * q_t + lane[None, :], line[:, None] * d_t + lane[None, :]
    k_at, v_at = line[None, :] * k_t + lane[:, None], line[None, :] * v_t + lane[:, None]
    for index in range(share, batch * tiles, tl.num_programs(2)):
        b, first = (index // tiles).to(tl.int64), (index % tiles) * TILE
        first_key = cached + first - (first_diagonal + diagonal) * TILE
        query, key = first + line, first_key + line
        asked, held = query < length, (key >= 0) & (key < keys)
        rows = asked[:, None] & (lane < WIDTH)[None, :]
        columns = held[None, :] & (lane < WIDTH)[:, None]
        at = first.to(tl.int64), first_key.to(tl.int64)
        queries = tl.load(q + b * q_b + at[0] * q_t + q_at, rows, 0.0)
        gradients = tl.load(d_y + b * d_b + at[0] * d_t + d_at, rows, 0.0)
        known = tl.load(k + b * k_b + at[1] * k_t + k_at, columns, 0.0)
        values = tl.load(v + b * v_b + at[1] * v_t + v_at, columns, 0.0)
        scores = tl.dot(queries, known, input_precision="ieee")
        d_weights = tl.dot(gradients, values, input_precision="ieee")
        logarithm = tl.load(lse + b * lse_b + query * lse_t, asked, 0.0)
        mean = tl.load(delta + b * delta_b + query * delta_t, asked, 0.0)
        seen = near & asked[:, None] & held[None, :]
        if REACH == "own" or REACH == "own_and_previous":
            # Counted from the start of the block before the cache: no number is negative.
            of_query = (query + offset + 2 * block_size) // block_size
            of_key = (key - cached + offset + 2 * block_size) // block_size
            blocks = of_query[:, None] - of_key[None, :]
            seen = seen & (blocks <= (1 if REACH == "own_and_previous" else 0))
        if MARKED:
            of_key = tl.load(marks + b * marks_b + key, held, 0)
            if REACH == "symmetric":
                seen = seen & ((of_key == 0)[None, :] | (back == 0))
            else:
                of_query = tl.load(marks + b * marks_b + cached + query, asked, 0)
                seen = seen & (of_query[:, None] == of_key[None, :])
        weights = tl.exp(scores * scale + added - logarithm[:, None])
        total += tl.where(seen, weights * (d_weights - mean[:, None]), 0.0)
    at = (share * tl.num_programs(0) + head) * tl.num_programs(1) + diagonal
    place = line[:, None] * TILE + line[None, :]
    tl.store(sums + at.to(tl.int64) * (TILE * TILE) + place, total)


def tiles_of_gradients(
    d_y: Tensor,
    delta: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    marks: Tensor | None,
    pairs: Pairs,
    scale: float,
    diagonals: range,
    tile: int,
) -> Tensor:
    """Gradients of scores, summed over all tiles of a diagonal.

    Args:
        d_y: as in `window_bias_gradient`.
        delta: likewise.
        bias: likewise.
        q: likewise.
        k: likewise.
        v: likewise.
        lse: likewise.
        marks: likewise.
        pairs: likewise.
        scale: likewise.
        diagonals: D consecutive ones; on diagonal d the first query of a tile comes d tiles behind
            its first key.
        tile: queries and keys of one.

    Returns:
        (H, D, queries, keys) fp32.
    """
    batch, length, heads, width = q.shape
    q, k, v, d_y = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, d_y))
    lanes = max(16, triton.next_power_of_2(width))  # 16: the least that `tl.dot` takes
    tiles = triton.cdiv(length, tile)
    shares = max(1, min(batch * tiles, PROGRAMS // (heads * len(diagonals))))
    sums = q.new_empty((shares, heads, len(diagonals), tile, tile), dtype=torch.float32)
    stage = 4 * tile * lanes * q.element_size()
    with torch.cuda.device_of(q):
        _tile_sums[heads, len(diagonals), shares](
            q,
            k,
            v,
            d_y,
            lse,
            delta,
            bias.contiguous(),
            marks,
            sums,
            batch,
            length,
            pairs.cached,
            pairs.block_size,
            pairs.offset,
            bias.shape[1],
            pairs.first_distance,
            diagonals.start,
            scale,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *d_y.stride()[:3],
            lse.stride(0),
            lse.stride(2),
            lse.stride(1),
            *delta.stride(),
            0 if marks is None else marks.stride(0),
            REACH=pairs.reach,
            MARKED=marks is not None,
            WIDTH=width,
            LANES=lanes,
            TILE=tile,
            num_warps=4 if lanes <= 64 else 8,
            num_stages=max(1, min(3, STAGED // stage)),
        )
    return sums.sum(0)
