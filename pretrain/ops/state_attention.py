"""Attention from the tokens of each block to that block's own few states, all of them visible.

Shapes: B batch, T queries, n blocks that the call touches, S states per block, H heads, K width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.window_attention import query_runs


def state_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, offset: int = 0, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v within each block.

    Args:
        q: (B, T, H, K).
        k: (B, n, S, H, K), the states that each block reads.
        v: like `k`.
        block_size: tokens per block.
        offset: tokens of the first block that came before this call.
        scale: of the scores; None: 1 / sqrt(K).

    Returns:
        (B, T, H, K).
    """
    outputs, block = [], 0
    for start, stop, size in query_runs(q.shape[1], offset, block_size):
        count = (stop - start) // size
        queries = q[:, start:stop].unflatten(1, (count, size)).flatten(0, 1).transpose(1, 2)
        keys, values = (x[:, block : block + count].flatten(0, 1).transpose(1, 2) for x in (k, v))
        y = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
        outputs.append(y.transpose(1, 2).unflatten(0, (-1, count)).flatten(1, 2))
        block += count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def state_attention_naive(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int, offset: int = 0, scale: float | None = None
) -> Tensor:
    """Every token with its own copy of the states. Signature of `state_attention`."""
    block = (offset + torch.arange(q.shape[1], device=q.device)) // block_size
    scores = torch.einsum("bthk,btshk->bhts", q, k[:, block])
    weights = (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
    return torch.einsum("bhts,btshk->bthk", weights, v[:, block])
