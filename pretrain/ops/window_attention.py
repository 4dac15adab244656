"""Attention whose cost does not grow with the context: sliding windows and blocks, by blocked SDPA.

Shapes: B batch, T queries, M cached keys in front of them, H heads, K head width, W block size.

Time is cut at multiples of W. The queries of a block see their own and the previous block, so every
mask is (W, 2W) at most and none is ever (T, T). Reach decides which of those keys count:

    "window"            the last W tokens, itself included (exactly)
    "own"               its own block, causally
    "own_and_previous"  its own block, causally, and all of the previous one

Masked weights are exact zeros, so a future token cannot change a single bit of the past.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reach = Literal["window", "own", "own_and_previous"]


def cached_keys(reach: Reach, block_size: int, offset: int) -> int:
    """How many keys a state holds when `offset` tokens of the present block have been seen."""
    return {"window": block_size, "own": offset, "own_and_previous": block_size + offset}[reach]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    reach: Reach,
    offset: int = 0,
    fresh: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Blocked SDPA over queries that continue a stream.

    Args:
        q: (B, T, H, K).
        k: (B, M + T, H, K), M = `cached_keys(...)`, or 0 when the call begins a document.
        v: like `k`.
        block_size: W.
        reach: which keys of the own and the previous block count.
        offset: tokens of the first block that came before this call, < W.
        fresh: (B, blocks touched) bool, True where a document begins with that block, which then
            sees nothing before itself; (B, 1) speaks of the first block only; None: no block does.
        scale: of the scores; None: 1 / sqrt(K).

    Returns:
        (B, T, H, K).
    """
    length, cached = q.shape[1], k.shape[1] - q.shape[1]
    outputs, block = [], 0
    for start, stop, size in _query_runs(length, offset, block_size):
        at = offset if start == 0 else 0  # place of the run's first query in its block
        # Keys in front of the block: what the cache holds, or the previous block.
        back = cached - offset if start == 0 else 0 if reach == "own" else block_size
        count = (stop - start) // size
        first_key = cached + start - at - back
        keys, values = (_key_blocks(x, first_key, back, at + size, count) for x in (k, v))
        queries = q[:, start:stop].unflatten(1, (count, size)).flatten(0, 1).transpose(1, 2)
        flags = fresh[:, block : block + count] if fresh is not None else None
        mask = _mask(reach, block_size, at, back, size, flags, q.device)
        y = F.scaled_dot_product_attention(
            queries,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        outputs.append(y.transpose(1, 2).unflatten(0, (-1, count)).flatten(1, 2))
        block += count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _query_runs(length: int, offset: int, block_size: int) -> list[tuple[int, int, int]]:
    """(start, stop, queries per block): the first block, the whole ones after it, a ragged tail.

    The first block stands alone because its keys come from the cache.
    """
    head = min(block_size - offset, length)
    tail = (length - head) % block_size
    bounds = [
        (0, head, head),
        (head, length - tail, block_size),
        (length - tail, length, tail),
    ]
    return [run for run in bounds if run[1] > run[0]]


def _key_blocks(x: Tensor, start: int, back: int, own: int, count: int) -> Tensor:
    """(B * count, back + own, H, K): for each block its `back` previous and `own` present keys."""
    if count == 1:
        return x[:, start : start + back + own]
    blocks = [x[:, start + back : start + back + count * own].unflatten(1, (count, own))]
    if back:  # a block repeats its predecessor's keys; there back == own == W
        blocks.insert(0, x[:, start : start + count * own].unflatten(1, (count, own)))
    return torch.cat(blocks, 2).flatten(0, 1)


def _mask(
    reach: Reach,
    block_size: int,
    at: int,
    back: int,
    size: int,
    fresh: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """True where visible: (size, keys), or (B * blocks, 1, size, keys); None: plain causal."""
    if at == 0 and back == 0:
        return None
    query = at + torch.arange(size, device=device).unsqueeze(1)
    key = torch.arange(back + at + size, device=device) - back
    visible = key <= query
    if reach == "window":
        visible = visible & (query - key < block_size)
    if fresh is None or fresh.shape[1] == 0 or back == 0:
        return visible
    hidden = fresh.flatten()[:, None, None] & (key < 0)
    return (visible & ~hidden).unsqueeze(1)


def window_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    reach: Reach,
    offset: int = 0,
    fresh: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One dense masked softmax over all keys: the definition. Signature of `window_attention`."""
    length, cached = q.shape[1], k.shape[1] - q.shape[1]
    query = (offset + torch.arange(length, device=q.device)).unsqueeze(1)
    key = torch.arange(cached + length, device=q.device) - (cached - offset)
    query_block, key_block = query // block_size, key.div(block_size, rounding_mode="floor")
    visible = key <= query
    if reach == "window":
        visible = visible & (query - key < block_size)
    else:
        visible = visible & (query_block - key_block <= (reach == "own_and_previous"))
    visible = visible.expand(q.shape[0], -1, -1)
    if fresh is not None:
        blocks = int(query_block[-1]) + 1
        begun = F.pad(fresh.long(), (0, blocks - fresh.shape[1])).cumsum(1)
        begun = F.pad(begun, (1, 0))  # column 0: everything before the first block
        document = begun[:, 1 + key_block.clamp(min=-1)]
        visible = visible & (begun[:, 1 + query_block[:, 0]].unsqueeze(2) == document.unsqueeze(1))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    weights = scores.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, v)
