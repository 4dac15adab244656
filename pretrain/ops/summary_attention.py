"""Window attention with a bank of summaries beside each block's window, under one softmax.

Shapes: B batch, T queries, M cached keys in front of them, H heads, K head width, W block size,
S summaries, n blocks that the call touches, r summaries per chunk.

A block's queries share their summaries, all of them of earlier blocks: no mask inside the bank
depends on the query, and a summary never contains a token that its reader must not see.
"""

from functools import reduce

import torch
from torch import Tensor

from pretrain.ops.attention_weights import attention_weights
from pretrain.ops.numerics import no_autocast, wide_dtype
from pretrain.ops.window_attention import _visible, key_blocks, keys_in_front, query_runs


def summarise_chunks(x: Tensor, scores: Tensor, chunk_size: int) -> Tensor:
    """Weighted means over each chunk, the weights a softmax of `scores` inside the chunk.

    Args:
        x: (B, T, H, K), T a multiple of `chunk_size`.
        scores: (B, T, H, r).
        chunk_size: tokens per chunk.

    Returns:
        (B, chunks, r, H, K).
    """
    x, scores = (part.unflatten(1, (-1, chunk_size)) for part in (x, scores))
    with no_autocast(x):
        weights = scores.to(wide_dtype(scores)).softmax(2).to(x.dtype)
        return torch.einsum("bclhr,bclhk->bcrhk", weights, x)


def summary_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_long: Tensor,
    bank_k: Tensor,
    bank_v: Tensor,
    known: Tensor,
    *,
    block_size: int,
    offset: int = 0,
    fresh: Tensor | None = None,
) -> Tensor:
    """Attention to the last W tokens and to the bank, scores scaled by 1 / sqrt(K).

    Args:
        q: (B, T, H, K), queries for the window.
        k: (B, M + T, H, K), M = W, or 0 when the call begins a document.
        v: like `k`.
        q_long: like `q`, queries for the bank.
        bank_k: (B, n, S, H, K), the summaries that each block sees.
        bank_v: like `bank_k`.
        known: (B or 1, n, S) bool, False for a summary that the block must not see.
        block_size: W.
        offset: tokens of the first block that came before this call, < W.
        fresh: see `window_attention`.

    Returns:
        (B, T, H, K).
    """
    length, cached = q.shape[1], k.shape[1] - q.shape[1]
    known = known.expand(q.shape[0], -1, -1)
    outputs, block = [], 0
    with no_autocast(q):
        for start, stop, size in query_runs(length, offset, block_size):
            at = offset if start == 0 else 0  # place of the run's first query in its block
            back = keys_in_front("window", block_size, cached - offset, start)
            count = (stop - start) // size
            queries, longer = (
                x[:, start:stop].unflatten(1, (count, size)).flatten(0, 1).transpose(1, 2)
                for x in (q * q.shape[-1] ** -0.5, q_long * q.shape[-1] ** -0.5)
            )
            first_key = cached + start - at - back
            keys, values = (
                key_blocks(x, first_key, back, at + size, count).transpose(1, 2) for x in (k, v)
            )
            bank = slice(block, block + count)
            far_keys, far_values = (
                x[:, bank].flatten(0, 1).transpose(1, 2) for x in (bank_k, bank_v)
            )
            flags = fresh[:, bank] if fresh is not None else None
            near = _visible("window", block_size, at, back, size, flags, q.device)
            if near is None:
                near = torch.ones(size, size, dtype=torch.bool, device=q.device).tril_()
            scores = [(queries @ keys.transpose(2, 3)).masked_fill(~near, -torch.inf)]
            read = [values]
            if far_keys.shape[2]:
                far = known[:, bank].flatten(0, 1)[:, None, None]
                scores.append((longer @ far_keys.transpose(2, 3)).masked_fill(~far, -torch.inf))
                read.append(far_values)
            wide = [part.to(wide_dtype(part)) for part in scores]
            y = reduce(torch.add, map(torch.matmul, attention_weights(wide, v.dtype), read))
            outputs.append(y.transpose(1, 2).unflatten(0, (-1, count)).flatten(1, 2))
            block += count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def summary_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_long: Tensor,
    bank_k: Tensor,
    bank_v: Tensor,
    known: Tensor,
    *,
    block_size: int,
    offset: int = 0,
    fresh: Tensor | None = None,
) -> Tensor:
    """One query at a time: the definition. Signature of `summary_attention`."""
    cached, scale, lanes = k.shape[1] - q.shape[1], q.shape[-1] ** -0.5, []
    known = known.expand(q.shape[0], -1, -1)
    for lane in range(q.shape[0]):
        begin, outputs = 0, []  # index of the first key of the present document
        for t in range(q.shape[1]):
            block = (offset + t) // block_size
            starts_here = t == 0 or (offset + t) % block_size == 0
            if starts_here and fresh is not None and block < fresh.shape[1] and fresh[lane, block]:
                begin = cached - offset + block * block_size
            keys = slice(max(begin, cached + t + 1 - block_size), cached + t + 1)
            seen = known[lane, block]
            far = torch.einsum("hk,shk->hs", q_long[lane, t], bank_k[lane, block, seen])
            near = torch.einsum("hk,shk->hs", q[lane, t], k[lane, keys])
            weights = (torch.cat([far, near], -1) * scale).softmax(-1)
            values = torch.cat([bank_v[lane, block, seen], v[lane, keys]])
            outputs.append(torch.einsum("hs,shk->hk", weights, values))
        lanes.append(torch.stack(outputs))
    return torch.stack(lanes)
