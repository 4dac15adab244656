"""Attention whose cost per token does not grow with the context: sliding windows and blocks.

Shapes: B batch, T queries, M cached keys in front of them, H heads, K head width, W block size.

Time is cut at multiples of W. The queries of a block see their own and the previous block, so every
mask is (W, 2W) at most and none is ever (T, T). Reach decides which of those keys count:

    "window"            the last W tokens, itself included (exactly)
    "own"               its own block, causally
    "own_and_previous"  its own block, causally, and all of the previous one

The forms share one signature, and `window_attention` chooses: matmuls block by block on a CPU; on a
GPU `flash_window_attention` where it serves, else `flex_window_attention`, and for short calls
`window_attention_sdpa`; beside them the naive twin. Masked weights are exact zeros, so a future
token cannot change a single bit of the past.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.flash_window_attention import flash_serves, flash_window_attention
from pretrain.ops.flex_window_attention import TILE, flex_window_attention
from pretrain.ops.masked_attention import masked_attention
from pretrain.ops.numerics import no_autocast, wide_dtype
from pretrain.ops.relative_bias import toeplitz_bias

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
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of queries that continue a stream.

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
        bias: (H, R) what is added to the scaled score of a key 0 .. R - 1 tokens back; R covers
            every visible distance; at least fp32.

    Returns:
        (B, T, H, K).
    """
    form = _window_attention_matmul if q.device.type == "cpu" else window_attention_sdpa
    if q.device.type == "cuda" and q.shape[1] >= TILE:  # below, nothing can be skipped
        form = flex_window_attention
        whole = not (offset or q.shape[1] % block_size or block_size % TILE)
        if bias is None and flash_serves(q) and (reach == "window" or (reach == "own" and whole)):
            form = flash_window_attention
    return form(
        q,
        k,
        v,
        block_size=block_size,
        reach=reach,
        offset=offset,
        fresh=fresh,
        scale=scale,
        bias=bias,
    )


def window_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    reach: Reach,
    offset: int = 0,
    fresh: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One fused kernel for all whole blocks, at the price of copying each key twice."""
    length, cached = q.shape[1], k.shape[1] - q.shape[1]
    outputs, block = [], 0
    for start, stop, size in query_runs(length, offset, block_size):
        at = offset if start == 0 else 0  # place of the run's first query in its block
        back = keys_in_front(reach, block_size, cached - offset, start)
        count = (stop - start) // size
        first_key = cached + start - at - back
        keys, values = (key_blocks(x, first_key, back, at + size, count) for x in (k, v))
        queries = q[:, start:stop].unflatten(1, (count, size)).flatten(0, 1).transpose(1, 2)
        flags = fresh[:, block : block + count] if fresh is not None else None
        mask = _visible(reach, block_size, at, back, size, flags, q.device)
        if bias is not None:
            if mask is None:
                mask = torch.ones(size, size, dtype=torch.bool, device=q.device).tril_()
            # (H, size, keys), or with flags (B * blocks, H, size, keys): flags cost memory here.
            mask = _bias_block(bias, at, back, size).to(q.dtype).masked_fill(~mask, -torch.inf)
        y = masked_attention(queries, keys.transpose(1, 2), values.transpose(1, 2), mask, scale)
        outputs.append(y.transpose(1, 2).unflatten(0, (-1, count)).flatten(1, 2))
        block += count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def keys_in_front(reach: Reach, block_size: int, first: int, start: int) -> int:
    """Keys that a block sees before its own: for the first block, those that the cache holds."""
    if start == 0:
        return first
    return 0 if reach == "own" else block_size


def query_runs(
    length: int, offset: int, block_size: int, *, alone: bool = True
) -> list[tuple[int, int, int]]:
    """(start, stop, queries per block): the first block, the whole ones after it, a ragged tail.

    The first block stands alone where its keys come from the cache; without `alone` only one of
    which the call has a part.
    """
    head = min(block_size - offset, length) if alone or offset else 0
    tail = (length - head) % block_size
    bounds = [
        (0, head, head),
        (head, length - tail, block_size),
        (length - tail, length, tail),
    ]
    return [run for run in bounds if run[1] > run[0]]


def key_blocks(x: Tensor, start: int, back: int, own: int, count: int) -> Tensor:
    """(B * count, back + own, H, K): for each block its `back` previous and `own` present keys."""
    if count == 1:
        return x[:, start : start + back + own]
    blocks = [x[:, start + back : start + back + count * own].unflatten(1, (count, own))]
    if back:  # a block repeats its predecessor's keys; there back == own == W
        blocks.insert(0, x[:, start : start + count * own].unflatten(1, (count, own)))
    return torch.cat(blocks, 2).flatten(0, 1)


def _visible(
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


def _bias_block(bias: Tensor, at: int, back: int, size: int) -> Tensor:
    """(H, R) by distance -> (H, size, keys) for a block; 0 for distances beyond R."""
    keys = back + at + size
    row = F.pad(bias, (0, max(0, keys - bias.shape[1])))
    return toeplitz_bias(row, size, keys, newest=keys - 1)


def _window_attention_matmul(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    reach: Reach,
    offset: int = 0,
    fresh: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Block by block with plain matmuls: no copies of keys, scores that fit the cache.

    The CPU's form: 3x faster than its flash kernel in bf16, equal in fp32.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    blocks = _blocks(q, k, block_size, reach, offset)
    biases: dict[tuple[int, int, int], Tensor] = {}
    if bias is not None:
        biases = {block.shape: bias for block in blocks}  # the same for all whole blocks
        biases = {shape: _bias_block(bias, *shape) for shape in biases}
    inputs = (q, k, v, *biases.values())
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with no_autocast(q):
        y = _BlockAttention.apply(
            q,
            k,
            v,
            blocks,
            block_size,
            reach,
            fresh,
            scale,
            needs_gradient,
            tuple(biases),
            *biases.values(),
        )
    return y.transpose(1, 2)


class _Block(NamedTuple):
    """Queries of one block and the keys they may see; `at` is the place of the first query in its
    block and `back` counts the keys before the block."""

    queries: slice
    keys: slice
    at: int
    back: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(at, back, queries)."""
        return self.at, self.back, self.queries.stop - self.queries.start


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: list[_Block],
        block_size: int,
        reach: Reach,
        fresh: Tensor | None,
        scale: float,
        needs_gradient: bool,
        shapes: tuple[tuple[int, int, int], ...],
        *biases: Tensor,
    ):
        """q (B, H, T, K), k and v (B, H, M + T, K), biases (H, queries, keys) by block shape."""
        q, k, v = (x.contiguous() for x in (q * scale, k, v))
        y = torch.empty_like(q)
        bias, saved = dict(zip(shapes, biases, strict=True)), []
        for index, block in enumerate(blocks):
            at, back, size = block.shape
            flags = None
            if fresh is not None and index < fresh.shape[1]:
                flags = fresh[:, index : index + 1]
            visible = _visible(reach, block_size, at, back, size, flags, q.device)
            scores = q[:, :, block.queries] @ k[:, :, block.keys].transpose(2, 3)
            if visible is None:
                visible = scores.new_ones(size, size, dtype=torch.bool).tril_()
            if bias:
                scores += bias[block.shape].to(scores.dtype)
            weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
            y[:, :, block.queries] = weights @ v[:, :, block.keys]
            if needs_gradient:
                saved.append(weights)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.blocks, ctx.scale, ctx.shapes = blocks, scale, shapes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        q, k, v, *saved = ctx.saved_tensors
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_bias: dict[tuple[int, int, int], Tensor] = {}
        for block, weights in zip(ctx.blocks, saved, strict=True):
            queries, keys = block.queries, block.keys
            d = d_y[:, :, queries].contiguous()
            d_v[:, :, keys] += weights.transpose(2, 3) @ d
            d_weights = d @ v[:, :, keys].transpose(2, 3)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_q[:, :, queries] = (d_scores @ k[:, :, keys]).mul_(ctx.scale)
            d_k[:, :, keys] += d_scores.transpose(2, 3) @ q[:, :, queries]
            if ctx.shapes:
                wide = wide_dtype(d_scores)
                d_bias[block.shape] = d_scores.sum(0, dtype=wide) + d_bias.get(block.shape, 0)
        biases = [d_bias[shape] for shape in ctx.shapes]
        return d_q, d_k, d_v, None, None, None, None, None, None, None, *biases


def _blocks(q: Tensor, k: Tensor, block_size: int, reach: Reach, offset: int) -> list[_Block]:
    """q (B, H, T, K), k (B, H, M + T, K)."""
    cached, blocks = k.shape[2] - q.shape[2], []
    for start, stop, size in query_runs(q.shape[2], offset, block_size):
        at = offset if start == 0 else 0
        back = keys_in_front(reach, block_size, cached - offset, start)
        for first in range(start, stop, size):
            last = cached + first + size
            keys = slice(cached + first - at - back, last)
            blocks.append(_Block(slice(first, first + size), keys, at, back))
    return blocks


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
    bias: Tensor | None = None,
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
    if bias is not None:
        scores = scores + bias[:, (query - key).clamp(0, bias.shape[1] - 1)]
    weights = scores.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, v)
