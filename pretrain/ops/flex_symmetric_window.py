"""Symmetric window attention by FlexAttention: one kernel, no copies of keys, no mask in memory.

Shapes: B batch, T time, H heads, K head width, W window size.

The tiles follow from arithmetic, as in pretrain/ops/flex_window_attention.py; here rows and columns
of tiles visit each other alike. With windows shorter than a tile most of a visited tile is masked,
which costs less than writing every key three times and the scores' gradients beside them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pretrain.ops.flex_window_attention import TILE
from pretrain.ops.flex_with_bias import flex_with_bias
from pretrain.ops.window_bias_gradient import Pairs


def flex_symmetric_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    padding: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Signature and meaning of `symmetric_window_attention`; only for compiled blocks on a GPU:
    uncompiled, it forms all scores."""
    given, w = q.shape[1], window_size
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, -given % TILE)) for x in (q, k, v))
    length = q.shape[1]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = ((query - key).abs() < w) & (key < given)
        if (
            padding is not None
        ):  # read as it came: inductor fails to inline a padded copy (torch 2.11)
            seen = seen & ~padding[b, key.clamp(max=given - 1)]
        return seen | (query == key)

    count, tiles = visited_tiles(length, w, q.device)
    mask = BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=count[None, None],
        kv_indices=tiles[None, None],
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=count[None, None],
        q_indices=tiles[None, None],
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(TILE, TILE),
        mask_mod=visible,
    )
    # For the bias's gradient; without one no compiled code makes them.
    hidden = padding if padding is not None else q.new_zeros(q.shape[0], given, dtype=torch.bool)
    marks = F.pad(hidden.int(), (0, length - given), value=1)
    y = flex_with_bias(flex_attention, q, k, v, bias, mask, Pairs("symmetric", w), marks, scale)
    return y[:, :given]


def visited_tiles(length: int, window_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tiles that hold a visible pair, by row and, the same ones, by column.

    Args:
        length: T, a multiple of `TILE`.
        window_size: W.
        device: of the result.

    Returns:
        How many, (T / TILE,) int32, and which: the first of each row of a (T / TILE, width) int32.
    """
    n = length // TILE
    reach = -(-(window_size - 1) // TILE)  # tiles to either side
    row = torch.arange(n, device=device)
    low, high = (row - reach).clamp(min=0), (row + reach).clamp(max=n - 1)
    entry = torch.arange(min(2 * reach + 1, n), device=device)
    tiles = (low.unsqueeze(1) + entry).clamp(max=n - 1)
    return (high - low + 1).int(), tiles.int()
