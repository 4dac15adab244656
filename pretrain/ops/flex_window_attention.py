"""Window and block attention by FlexAttention: one kernel, no copies of keys, no dense mask.

Shapes: B batch, T queries, M cached keys in front of them, H heads, K head width, W block size.

FlexAttention skips tiles of the score matrix that a block mask calls empty and masks nothing in
those it calls full. `create_block_mask` would evaluate the mask on all T x (M + T) pairs first;
here the tiles follow from arithmetic: every row of tiles visits an interval of columns whose ends
only ever move to the right, and so does the interval of full ones. Everything is computed on the
device, and no shape depends on the data.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pretrain.ops.flex_with_bias import flex_with_bias
from pretrain.ops.window_bias_gradient import Pairs

TILE = 128  # FlexAttention's granularity of sparsity, in queries and in keys

# Outside of a compiled block it has to be compiled by itself: eager, it would form all scores. To
# that Dynamo falls back, with a warning, behind so many kinds of calls. Its default of 8 is less
# than two kinds of layers have, with and without a cache, flags and gradients.
KINDS_OF_CALLS = 128
_compiled_flex_attention = torch.compile(flex_attention, dynamic=False)


class Tiles(NamedTuple):
    """Per row of tiles: how many columns, and which (the first `count` entries of a row).

    partial_count, full_count: (rows,) int32; partial, full: (rows, width) int32.
    """

    partial_count: Tensor
    partial: Tensor
    full_count: Tensor
    full: Tensor


def flex_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    reach: str,
    offset: int = 0,
    fresh: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Signature and meaning of `window_attention`; needs a GPU, and T >= 1 tile to be worth it."""
    given, cached = q.shape[1], k.shape[1] - q.shape[1]
    if given % TILE:  # up to whole tiles, by tokens that no other sees: lengths then share kernels
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -given % TILE)) for x in (q, k, v))
    length = q.shape[1]
    documents = (
        None if fresh is None else document_numbers(length, cached, block_size, offset, fresh)
    )

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = query + cached - key
        seen = back >= 0
        if reach == "window":
            seen = seen & (back < block_size)
        else:
            # Counted from the start of the block before the cache, so that no number is negative.
            query_block = (query + offset + 2 * block_size) // block_size
            key_block = (key - cached + offset + 2 * block_size) // block_size
            seen = seen & (query_block - key_block <= (1 if reach == "own_and_previous" else 0))
        if documents is not None:
            seen = seen & (documents[b, query + cached] == documents[b, key])
        return seen

    rows, columns = visited_tiles(
        length, cached, block_size, reach, offset, whole=fresh is None, device=q.device
    )
    mask = BlockMask(
        seq_lengths=(length, cached + length),
        kv_num_blocks=rows.partial_count[None, None],
        kv_indices=rows.partial[None, None],
        full_kv_num_blocks=rows.full_count[None, None],
        full_kv_indices=rows.full[None, None],
        q_num_blocks=columns.partial_count[None, None],
        q_indices=columns.partial[None, None],
        full_q_num_blocks=columns.full_count[None, None],
        full_q_indices=columns.full[None, None],
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=visible,
    )
    pairs = Pairs(reach, block_size, cached, offset)
    arguments = q, k, v, bias, mask, pairs, documents, scale
    if torch.compiler.is_compiling():
        y = flex_with_bias(flex_attention, *arguments)
    else:
        with torch._dynamo.config.patch(recompile_limit=KINDS_OF_CALLS):
            y = flex_with_bias(_compiled_flex_attention, *arguments)
    return y[:, :given]


# An operator, so that the numbers are in memory when a mask asks for them. Otherwise inductor works
# them out anew for every pair of a partial tile, or fails to (torch 2.11, without gradients).
@torch.library.custom_op("longspan::document_numbers", mutates_args=())
def document_numbers(
    length: int, cached: int, block_size: int, offset: int, fresh: Tensor
) -> Tensor:
    """(B, M + T): keys and queries of one document share a number; what the cache holds is in one
    document with the first block, unless that block begins one."""
    blocks = -(-(offset + length) // block_size)
    begun = F.pad(fresh.int(), (1, blocks - fresh.shape[1])).cumsum(1, dtype=torch.int32)
    # Counted from the block before the first, which holds the cache.
    token = torch.arange(cached + length, device=fresh.device) - cached + offset + block_size
    return begun[:, token.div(block_size, rounding_mode="floor").clamp(min=0)]


@document_numbers.register_fake
def _(length: int, cached: int, block_size: int, offset: int, fresh: Tensor) -> Tensor:
    return fresh.new_empty(fresh.shape[0], cached + length, dtype=torch.int32)


def visited_tiles(
    length: int,
    cached: int,
    block_size: int,
    reach: str,
    offset: int,
    *,
    whole: bool,
    device: torch.device,
) -> tuple[Tiles, Tiles]:
    """The tiles that hold a visible pair: by row (queries), and by column (keys).

    Args:
        length: T.
        cached: M.
        block_size: W.
        reach: as in `window_attention`.
        offset: as in `window_attention`.
        whole: False where documents may hide any pair, so that no tile is full.
        device: of the result.
    """
    keys = cached + length
    n_rows, n_columns = -(-length // TILE), -(-keys // TILE)
    first = TILE * torch.arange(n_rows, device=device)
    last = (first + TILE - 1).clamp(max=length - 1)

    def oldest_key(query: Tensor) -> Tensor:
        if reach == "window":
            return (query + cached - block_size + 1).clamp(min=0)
        back = 1 if reach == "own_and_previous" else 0
        block = (query + offset).div(block_size, rounding_mode="floor") - back
        return (block * block_size + cached - offset).clamp(min=0)

    low, high = oldest_key(first) // TILE, (last + cached) // TILE
    # A tile is full if its oldest key is in reach of the row's last query and its newest is not in
    # the future of the first.
    full_low = (oldest_key(last) + TILE - 1) // TILE
    full_high = (first + cached + 1) // TILE - 1
    if not whole:
        full_low = high + 1
    # A column's rows: those whose interval has begun to include it and has not yet passed it.
    column = torch.arange(n_columns, device=device)
    row_low = torch.searchsorted(high, column)
    row_high = torch.searchsorted(low, column, right=True) - 1
    row_full_low = torch.searchsorted(full_high, column)
    row_full_high = torch.searchsorted(full_low, column, right=True) - 1
    # How many tiles an interval can span: the reach, and one more at either end.
    span = ((2 if reach == "own_and_previous" else 1) * block_size + TILE - 2) // TILE + 2
    return (
        _tiles(low, high, full_low, full_high, min(span, n_columns)),
        _tiles(row_low, row_high, row_full_low, row_full_high, min(span, n_rows)),
    )


def _tiles(low: Tensor, high: Tensor, full_low: Tensor, full_high: Tensor, width: int) -> Tiles:
    """Intervals (rows,), ends included, as counts and indices; an interval may be empty."""
    full_count = (full_high - full_low + 1).clamp(min=0)
    full_low = torch.where(full_count > 0, full_low, high + 1)
    entry = torch.arange(width, device=low.device)
    full = full_low.unsqueeze(1) + entry
    # Before the full ones, and after them.
    partial = low.unsqueeze(1) + entry
    partial = torch.where(
        partial < full_low.unsqueeze(1), partial, partial + full_count.unsqueeze(1)
    )
    partial_count = (high - low + 1).clamp(min=0) - full_count
    return Tiles(*(part.int() for part in (partial_count, partial, full_count, full)))
