"""Sliding-window attention out of the joined projection to q, k and v.

Shapes: B batch, T queries, M cached keys in front of them, H heads, K head width, W block size, S
sequences of documents.

Where FlashAttention-4 serves, one operator each way: its kernels write the gradient of the values
into the joined tensor by which the projection's backward multiplies, and that of the queries goes
there from fp32, as they add it up. By two operators, which all else takes, the first is copied
there, and the second converted on its way.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from pretrain.ops.flash_window_attention import (
    SUMMED_WIDTH,
    document_starts,
    flash_serves,
    flash_window,
    write_gradients,
)
from pretrain.ops.normalization import rotary_table
from pretrain.ops.numerics import wide_dtype
from pretrain.ops.qkv_heads import last_tokens, prepare_parts, prepare_qkv
from pretrain.ops.window_attention import TILE, window_attention


def projected_window_attention(
    qkv: Tensor,
    cache: tuple[Tensor, Tensor] | None = None,
    *,
    block_size: int,
    scale: Tensor | None = None,
    base: float | None = None,
    keep: int = 0,
    offset: int = 0,
    fresh: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention of the last W tokens' keys and values, which a stream may have begun before.

    Args:
        qkv: (B, T, 3, H, K).
        cache: keys and values in front of the call's, as projected, (B, M, H, K) each.
        block_size: W.
        scale: (H,), multiplied onto L2-normalised queries; keys are normalised then, too, and
            scores not scaled. None: no norms, and scores over sqrt(K).
        base: of the rotary wavelengths; None: no rotation.
        keep: how many keys and values a state holds; zeros in front where there are fewer.
        offset: as in `window_attention`.
        fresh: likewise.
        bias: likewise.

    Returns:
        (B, T, H, K), and the last keys and values as projected, (B, keep, H, K) each.
    """
    prepared = scale is not None or base is not None
    long = qkv.is_cuda and qkv.shape[1] >= TILE  # as in `window_attention`
    if long and prepared and cache is None and bias is None and flash_serves(qkv):
        return flash_projected_window_attention(
            qkv,
            block_size=block_size,
            scale=scale,
            base=base,
            keep=keep,
            offset=offset,
            fresh=fresh,
        )
    heads = prepare_qkv(qkv, cache, scale=scale, base=base, keep=keep)
    y = window_attention(
        heads.q,
        heads.k,
        heads.v,
        block_size=block_size,
        reach="window",
        offset=offset,
        fresh=fresh,
        scale=None if scale is None else 1.0,
        bias=bias,
    )
    return y, heads.kept


def flash_projected_window_attention(
    qkv: Tensor,
    *,
    block_size: int,
    scale: Tensor | None = None,
    base: float | None = None,
    keep: int = 0,
    offset: int = 0,
    fresh: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Of a document's first call, with norms or positions. Signature and result of
    `projected_window_attention`."""
    length, width = qkv.shape[1], qkv.shape[4]
    cos = sin = q_starts = k_starts = None
    if base is not None:
        cos, sin = rotary_table(0, length, width, base, wide_dtype(qkv), qkv.device)
    if fresh is not None and fresh.shape[1] > 1:
        q_starts, k_starts = document_starts(length, 0, block_size, offset, fresh)
    of_scores = width**-0.5 if scale is None else 1.0
    last = min(keep, length)
    y, kept = _attend(qkv, scale, cos, sin, q_starts, k_starts, last, block_size, of_scores)
    last_k, last_v = (last_tokens(part, keep) for part in kept.unbind(2))
    return y, (last_k, last_v)


# As a whole in the graph, and the last keys and values by the same door: see `prepare_qkv`.
@torch.compiler.allow_in_graph
def _attend(
    qkv: Tensor,
    scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    last: int,
    block_size: int,
    of_scores: float,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, K), and a view of the last keys and values (B, last, 2, H, K)."""
    inputs = qkv, scale, cos, sin, q_starts, k_starts
    return _Attend.apply(*inputs, last, block_size, of_scores)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        scale: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        q_starts: Tensor | None,
        k_starts: Tensor | None,
        last: int,
        block_size: int,
        of_scores: float,
    ) -> tuple[Tensor, Tensor]:
        q, k = prepare_parts(qkv, scale, cos, sin)
        y, sums = flash_window(q, k, qkv[:, :, 2], q_starts, k_starts, block_size, of_scores)
        ctx.save_for_backward(qkv, q, k, y, sums, scale, cos, sin, q_starts, k_starts)
        ctx.numbers = block_size, of_scores
        ctx.set_materialize_grads(False)  # no zeros for a state that nobody keeps
        return y, qkv[:, qkv.shape[1] - last :, 1:3]

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
        qkv, _, _, y, _, scale, *_ = ctx.saved_tensors
        batch, _, _, *head = qkv.shape
        d_y = torch.zeros_like(y) if d_y is None else d_y
        d_last = qkv.new_empty(batch, 0, 2, *head) if d_last is None else d_last
        d_qkv, d_scale = projected_window_backward(d_y, d_last, *ctx.saved_tensors, *ctx.numbers)
        return d_qkv, None if scale is None else d_scale, *[None] * 7


@torch.library.custom_op(
    "longspan::projected_window_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def projected_window_backward(
    d_y: Tensor,
    d_last: Tensor,
    qkv: Tensor,
    q: Tensor,
    k: Tensor,
    y: Tensor,
    sums: Tensor,
    scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    block_size: int,
    of_scores: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of the projection, (B, T, 3, H, K) contiguous, and of the scales (H,), or (0,).

    Args:
        d_y: (B, T, H, K).
        d_last: that of the last keys and values, (B, n, 2, H, K), where n may be 0.
        qkv: (B, T, 3, H, K).
        q: prepared, (B, T, H, K).
        k: like `q`.
        y: attention's output, like `q`.
        sums: as of `flash_window`.
        scale: (H,).
        cos: as in `prepare_heads_forward`.
        sin: likewise.
        q_starts: as of `document_starts`.
        k_starts: likewise.
        block_size: W.
        of_scores: what the scores are multiplied by.
    """
    from pretrain.ops.qkv_heads_kernels import prepare_heads_backward
    from pretrain.ops.summed_heads_kernel import prepare_heads_backward_of_sum

    qkv = qkv.contiguous()
    d_qkv, d_k = torch.empty_like(qkv), torch.empty_like(k)
    summed = q_starts is None and q.shape[3] == SUMMED_WIDTH and reads_sums(q.device, q.dtype)
    d_q = d_qkv[:, :, 0] if summed else torch.empty_like(q)
    saved = q, k, qkv[:, :, 2], y, sums, q_starts, k_starts
    into = d_q, d_k, d_qkv[:, :, 2]
    total = write_gradients(d_y, *saved, block_size, of_scores, into, summed=summed)
    count, normalize = d_last.shape[1], scale is not None
    also = d_last[:, :, 0].contiguous() if count else None
    of_queries = qkv, d_qkv, 0, scale, cos, sin
    if total is None:
        d_scale = prepare_heads_backward(d_q, None, *of_queries, normalize=normalize)
    else:
        d_scale = prepare_heads_backward_of_sum(total, of_scores, *of_queries, normalize=normalize)
    prepare_heads_backward(d_k, also, qkv, d_qkv, 1, None, cos, sin, normalize=normalize)
    if count:
        d_qkv[:, qkv.shape[1] - count :, 2] += d_last[:, :, 1]
    return d_qkv, qkv.new_empty(0) if scale is None or d_scale is None else d_scale.to(scale.dtype)


@functools.cache
def reads_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the queries' gradients read off FlashAttention's sums are those that it converts
    itself, tried once in every process: nobody promises their order, and nothing else would tell.
    """
    from pretrain.ops.summed_heads_kernel import prepare_heads_backward_of_sum

    # No random numbers, whose state is the training's. Tiles of queries and of keys: several each.
    waves = torch.arange(4 * 192 * 2 * SUMMED_WIDTH, device=device).double().square().sin()
    q, k, v, d_y = waves.to(dtype).view(4, 1, 192, 2, SUMMED_WIDTH)
    block_size, of_scores = 64, 0.1
    y, sums = flash_window(q, k, v, None, None, block_size, of_scores)
    saved = d_y, q, k, v, y, sums, None, None, block_size, of_scores
    want, *rest = (torch.empty_like(q) for _ in range(3))
    write_gradients(*saved, (want, *rest))
    total = write_gradients(*saved, (torch.empty_like(q), *rest), summed=True)
    assert total is not None
    found = q.new_empty(1, 192, 3, 2, SUMMED_WIDTH)
    prepare_heads_backward_of_sum(
        total, of_scores, found, found, 0, None, None, None, normalize=False
    )
    error = (found[:, :, 0].double() - want.double()).norm() / want.double().norm()
    right = bool(error < 0.01)  # 8 bits
    if not right:
        warnings.warn(
            f"flash-attn-4 adds up gradients in another order than this code reads (error "
            f"{error:.2g}): they take the pass that converts them, 0.1 ms per layer",
            stacklevel=2,
        )
    return right


@projected_window_backward.register_fake
def _(d_y: Tensor, d_last: Tensor, qkv: Tensor, *saved: Any) -> tuple[Tensor, Tensor]:
    scale = saved[4]
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if scale is None else torch.empty_like(scale)
