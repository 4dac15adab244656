"""Attention over vector-quantised keys at a cost linear in time (Transformer-VQ, 2309.16354).

Time is cut into blocks. A query sees the keys of its own and the previous block one by one, with a
position bias, and all older ones only through the codebook: how many keys fell on code s, l_s, and
the mean of their values, mu_s.

    score of a recent key j   q_i . k^_j + b_{i-j}          k^_j = C[z_j], straight-through
    score of code s           q_i . C_s + log l_s           -inf where l_s = 0
    o_i = sum_j a_ij v_j + sum_s a_is mu_s                  one softmax over both

Shapes: B batch, T queries, M cached keys in front of them, H heads, S codes, K key width, V value
width, W block size, R distances.

It is not an approximation of attention over quantised keys but equal to it: keys with one code have
one score, l of them weigh log l more, and a softmax is linear in values. Gradients agree too under
one rule, which the quadratic twin states: straight-through (the gradient of k^ goes to k) inside
the exact zone only; an older key is the constant C[z].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.attention_weights import attention_weights
from pretrain.ops.numerics import no_autocast, wide_dtype
from pretrain.ops.relative_bias import toeplitz_bias
from pretrain.ops.window_attention import key_blocks, keys_in_front, query_runs

FORGOTTEN = -1  # the code of a cached key that nobody may see any more


class VQCache(NamedTuple):
    """Everything before the previous block.

    Attributes:
        counts: (B, H, S), l, in at least fp32 (exact up to 16 million keys per code).
        means: (B, H, S, V), mu; means and not sums, so that no length overflows them.
    """

    counts: Tensor
    means: Tensor


def nearest_codes(k: Tensor, codebook: Tensor) -> Tensor:
    """The code argmin_s |k - C_s|^2 of each key, in at least fp32.

    Args:
        k: (B, T, H, K).
        codebook: (H, S, K).

    Returns:
        (B, T, H) int64.
    """
    with no_autocast(k), torch.no_grad():
        dtype = wide_dtype(k, codebook)
        book = codebook.to(dtype)
        # Trained keys and codes crowd together. Scores taken from the origin differ in their last
        # digits only, where rounding decides; taken from among the codes they do not.
        centre = book.mean(1)  # (H, K)
        k, book = k.to(dtype) - centre, book - centre.unsqueeze(1)
        dots = torch.einsum("bthk,hsk->bths", k, book)
        return (dots - book.square().sum(-1) / 2).argmax(-1)


def straight_through(k: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """C[z], with the gradient going to k. Shapes as in `nearest_codes`; like `k`."""
    return look_up(codes, codebook).to(k.dtype) + (k - k.detach())


def look_up(codes: Tensor, codebook: Tensor) -> Tensor:
    """C[z] (B, T, H, K) of codes (B, T, H); of forgotten keys anything."""
    heads, size = codebook.shape[:2]
    row = size * torch.arange(heads, device=codes.device)
    return codebook.flatten(0, 1)[codes.clamp(min=0) + row]


def vq_attention(
    q: Tensor,
    local_q: Tensor,
    local_k: Tensor,
    codes: Tensor,
    v: Tensor,
    codebook: Tensor,
    cache: VQCache,
    bias: Tensor | None = None,
    *,
    block_size: int,
    offset: int = 0,
    fresh: Tensor | None = None,
) -> tuple[Tensor, VQCache]:
    """The linear-time form.

    Args:
        q: (B, T, H, K), scaled, for the codebook.
        local_q: like `q`, for recent keys: `q` itself, or rotated.
        local_k: (B, M + T, H, K), straight-through keys, rotated as `local_q` is; M is W + offset,
            or 0 when the call begins a document.
        codes: (B, M + T, H) int64; `FORGOTTEN` ones are invisible.
        v: (B, M + T, H, V).
        codebook: (H, S, K), a constant.
        cache: of the blocks before the previous one.
        bias: (H, R), R >= 2W, by distance to recent keys.
        block_size: W.
        offset: tokens of the first block that came before this call, < W.
        fresh: (B, blocks touched) bool, True where a document begins with that block; (B, 1) speaks
            of the first block only; None: no block does.

    Returns:
        (B, T, H, V), and the cache for the call that follows.
    """
    before, after = _caches(codes, v, cache, q.shape[1], block_size, offset, fresh)
    wide, book = cache.means.dtype, codebook.to(q.dtype).transpose(1, 2)
    cached, outputs, block = local_k.shape[1] - q.shape[1], [], 0
    for start, stop, size in query_runs(q.shape[1], offset, block_size):
        at = offset if start == 0 else 0
        back = keys_in_front("own_and_previous", block_size, cached - offset, start)
        count = (stop - start) // size
        first = cached + start - at - back
        # In memory of their own: a view of one block would keep all T tokens for the backward.
        keys, values, seen = (
            key_blocks(x, first, back, at + size, count).contiguous()
            for x in (local_k, v, codes.unsqueeze(-1))
        )
        keys, values, seen = (
            x.unflatten(0, (-1, count)).transpose(2, 3) for x in (keys, values, seen)
        )
        counts, means = (
            torch.stack(parts, 1) for parts in zip(*before[block : block + count], strict=True)
        )
        far, near = (
            x[:, start:stop].unflatten(1, (count, size)).transpose(2, 3) for x in (q, local_q)
        )
        recent = (near @ keys.transpose(-1, -2)).to(wide)  # (B, count, H, size, keys)
        if bias is not None:
            recent = recent + toeplitz_bias(bias, size, at + back + size, at + back + size - 1)
        age = at + torch.arange(size, device=q.device).unsqueeze(1)
        place = torch.arange(back + at + size, device=q.device) - back
        visible = (place <= age) & (seen != FORGOTTEN).transpose(-1, -2)
        if fresh is not None and block < fresh.shape[1]:
            begun = fresh[:, block : block + count, None, None, None]
            visible = visible & ~(begun & (place < 0))
        recent = recent.masked_fill(~visible, -torch.inf)
        # log 0 = -inf hides a code that nothing fell on
        old = (far @ book).to(wide) + counts.log().unsqueeze(-2)
        near, far = attention_weights((recent, old), v.dtype)
        y = near @ values + far @ means.to(v.dtype)
        outputs.append(y.transpose(2, 3).flatten(1, 2))
        block += count
    return torch.cat(outputs, 1), after


def _caches(
    codes: Tensor,
    v: Tensor,
    cache: VQCache,
    length: int,
    block_size: int,
    offset: int,
    fresh: Tensor | None,
) -> tuple[list[VQCache], VQCache]:
    """The cache that each block sees, and the last.

    A block sees what lies before its predecessor; when it ends, the predecessor joins the cache.
    """
    touched, ended = -(-(offset + length) // block_size), (offset + length) // block_size
    first = 0 if codes.shape[1] > length else 1  # the first block that has a predecessor
    joining = max(0, ended - first)
    counts, sums = _block_statistics(codes, v, joining, block_size, cache)
    seen: list[VQCache] = []
    for block in range(touched):
        keep = None
        if fresh is not None and block < fresh.shape[1]:
            keep = ~fresh[:, block, None, None]
            cache = VQCache(cache.counts * keep, cache.means * keep.unsqueeze(-1))
        seen.append(cache)
        if first <= block < ended:
            count, total = counts[:, block - first], sums[:, block - first]
            if keep is not None:
                count, total = count * keep, total * keep.unsqueeze(-1)
            after = cache.counts + count
            share = 1 / after.clamp(min=1).unsqueeze(-1)
            mean = cache.means * (cache.counts.unsqueeze(-1) * share) + total * share
            cache = VQCache(after, mean)
    return seen, cache


def _block_statistics(
    codes: Tensor, v: Tensor, blocks: int, block_size: int, like: VQCache
) -> tuple[Tensor, Tensor]:
    """Of the first whole blocks of keys: how many fell on each code, and the sum of their values.

    Returns:
        (B, blocks, H, S) and (B, blocks, H, S, V).
    """
    batch, _, heads, width = v.shape
    size, dtype = like.counts.shape[2], like.means.dtype
    codes = codes[:, : blocks * block_size].unflatten(1, (blocks, block_size))
    values = v[:, : blocks * block_size].to(dtype).unflatten(1, (blocks, block_size))
    seen = (codes != FORGOTTEN).to(dtype)
    group = torch.arange(batch * blocks, device=v.device).view(batch, blocks, 1, 1) * heads
    rows = (group + torch.arange(heads, device=v.device)) * size + codes.clamp(min=0)
    counts = v.new_zeros(batch * blocks * heads * size, dtype=dtype)
    counts = counts.index_add(0, rows.flatten(), seen.flatten())
    sums = v.new_zeros(batch * blocks * heads * size, width, dtype=dtype)
    sums = sums.index_add(0, rows.flatten(), (values * seen.unsqueeze(-1)).flatten(0, 3))
    shape = (batch, blocks, heads, size)
    return counts.view(shape), sums.view(*shape, width)


def two_sided_vq_attention(
    q: Tensor,
    local_q: Tensor,
    local_k: Tensor,
    codes: Tensor,
    v: Tensor,
    codebook: Tensor,
    bias: Tensor | None = None,
    *,
    block_size: int,
) -> Tensor:
    """For encoders: the own block and both neighbours key by key, all others by their codes.

    Args:
        q: (B, T, H, K), scaled, for the codebook.
        local_q: like `q`, for near keys.
        local_k: (B, T, H, K), straight-through keys.
        codes: (B, T, H) int64; `FORGOTTEN` ones, those of pads, are invisible.
        v: (B, T, H, V).
        codebook: (H, S, K), a constant.
        bias: (H, 4W - 1), by distance from 1 - 2W to 2W - 1, query position minus key position.
        block_size: W.

    Returns:
        (B, T, H, V); of a lane without any visible key anything finite.
    """
    length, w = q.shape[1], block_size
    blocks, dtype = -(-length // w), wide_dtype(v)
    # A block of nothing in front, and behind whatever fills the last one and a block of nothing.
    behind = (blocks + 1) * w - length
    codes = F.pad(codes, (0, 0, w, behind), value=FORGOTTEN)
    local_k, v = (F.pad(x, (0, 0, 0, 0, w, behind)) for x in (local_k, v))
    q, local_q = (
        F.pad(x, (0, 0, 0, 0, 0, behind - w)).unflatten(1, (blocks, w)).transpose(2, 3)
        for x in (q, local_q)
    )
    zeros = v.new_zeros(v.shape[0], v.shape[2], codebook.shape[1], 1, dtype=dtype)
    empty = VQCache(zeros.squeeze(-1), zeros)
    counts, sums = _block_statistics(codes[:, w:-w], v[:, w:-w], blocks, w, empty)
    # Sums over blocks up to n - 2 and from n + 2 on, and no differences, which would round.
    counts, sums = (_all_but_neighbours(x) for x in (counts, sums))
    means = (sums / counts.clamp(min=1).unsqueeze(-1)).to(v.dtype)

    near = [
        torch.cat([x[:, i * w : (i + blocks) * w].unflatten(1, (blocks, w)) for i in range(3)], 2)
        for x in (local_k, v, codes.unsqueeze(-1))
    ]
    keys, values, seen = (x.transpose(2, 3) for x in near)  # (B, blocks, H, 3W, ...)
    recent = (local_q @ keys.transpose(-1, -2)).to(dtype)
    if bias is not None:
        recent = recent + toeplitz_bias(bias, w, 3 * w, 4 * w - 2)
    hidden = (seen == FORGOTTEN).transpose(-1, -2)
    recent = recent.masked_fill(hidden, torch.finfo(dtype).min)
    old = (q @ codebook.to(q.dtype).transpose(1, 2)).to(dtype) + counts.log().unsqueeze(-2)
    recent, old = attention_weights((recent, old), v.dtype)
    y = recent @ values + old @ means
    return y.transpose(2, 3).flatten(1, 2)[:, :length]


def _all_but_neighbours(x: Tensor) -> Tensor:
    """x (B, blocks, ...) -> for each block the sum over all that are neither it nor beside it."""
    nothing = x.new_zeros(x.shape[0], 2, *x.shape[2:])
    before = torch.cat([nothing, x.cumsum(1)], 1)[:, : x.shape[1]]
    after = torch.cat([nothing, x.flip(1).cumsum(1)], 1)[:, : x.shape[1]].flip(1)
    return before + after


def vq_attention_quadratic(
    q: Tensor,
    local_q: Tensor,
    local_k: Tensor,
    codes: Tensor,
    v: Tensor,
    codebook: Tensor,
    cache: VQCache,
    bias: Tensor | None = None,
    *,
    block_size: int,
    offset: int = 0,
    fresh: Tensor | None = None,
) -> tuple[Tensor, VQCache]:
    """One dense softmax over all keys of the call, each by itself: the definition.

    Signature of `vq_attention`. Keys older than the call's are known only as its first cache: they
    enter as l_s copies of a key C_s with value mu_s.
    """
    length, cached, size = q.shape[1], local_k.shape[1] - q.shape[1], codebook.shape[1]
    query = (offset + torch.arange(length, device=q.device)).unsqueeze(1)
    key = torch.arange(cached + length, device=q.device) - (cached - offset)
    query_block, key_block = query // block_size, key.div(block_size, rounding_mode="floor")
    begun = q.new_zeros(q.shape[0], int(query_block[-1]) + 2, dtype=torch.int64)
    if fresh is not None:
        begun[:, 1 : 1 + fresh.shape[1]] = fresh.long()
    begun = begun.cumsum(1)  # column 0: everything before the first block
    document = begun[:, 1 + key_block.clamp(min=-1)]
    visible = (key <= query) & (begun[:, 1 + query_block[:, 0]].unsqueeze(2) == document[:, None])
    visible = visible.unsqueeze(1) & (codes != FORGOTTEN).permute(0, 2, 1).unsqueeze(2)

    old = torch.einsum("bthk,bshk->bhts", q, look_up(codes, codebook).to(q.dtype))
    recent = torch.einsum("bthk,bshk->bhts", local_q, local_k)
    if bias is not None:
        recent = recent + bias[:, (query - key).clamp(0, bias.shape[1] - 1)]
    scores = torch.where(query_block - key_block <= 1, recent, old)
    scores = scores.masked_fill(~visible, -torch.inf)
    before = torch.einsum("bthk,hsk->bhts", q, codebook.to(q.dtype))
    before = before + cache.counts.log().unsqueeze(2)
    alive = begun[:, 1 + query_block[:, 0]] == 0
    before = before.masked_fill(~alive[:, None, :, None], -torch.inf)
    weights = torch.cat([scores, before], -1).softmax(-1)
    y = torch.einsum("bhts,bshv->bthv", weights[..., :-size], v)
    y = y + torch.einsum("bhts,bhsv->bthv", weights[..., -size:], cache.means)

    last = (offset + length) // block_size - 1  # this block and the next stay out of the cache
    present = begun[:, -1:]
    gone = (key_block < last) & (document == present)
    one_hot = (codes.unsqueeze(-1) == torch.arange(size, device=q.device)) & gone[..., None, None]
    one_hot = one_hot.to(cache.counts.dtype)
    kept = (present == 0).unsqueeze(2)
    count = cache.counts * kept + one_hot.sum(1)
    total = (cache.counts * kept).unsqueeze(-1) * cache.means
    total = total + torch.einsum("bths,bthv->bhsv", one_hot, v)
    return y, VQCache(count, total / count.clamp(min=1).unsqueeze(-1))
