"""FlexAttention with or without a bias by distance, as windows on one and on both sides call it.

Shapes: B batch, T queries, M cached keys in front of them, H heads, K head width, R distances.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from pretrain.ops.window_bias_gradient import Pairs, with_bias_gradient


def flex_with_bias(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: BlockMask,
    pairs: Pairs,
    marks: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention whose bias has its gradient from `window_bias_gradient`.

    Args:
        attend: `flex_attention`, compiled or about to be.
        q: (B, T, H, K).
        k: (B, M + T, H, K).
        v: like `k`.
        bias: (H, R) fp32, what is added to scaled scores, from `pairs.first_distance` on.
        mask: which keys are visible.
        pairs: the same.
        marks: the same, as in `with_bias_gradient`.
        scale: of the scores; None: 1 / sqrt(K).

    Returns:
        (B, T, H, K).
    """
    # A constant here: FlexAttention would give it a gradient by atomics.
    added = None if bias is None else bias.detach()

    def biased(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert added is not None
        place = query + pairs.cached - key - pairs.first_distance
        return score + added[h, place.clamp(0, added.shape[1] - 1)]

    owed = bias if bias is not None and bias.requires_grad and torch.is_grad_enabled() else None
    y, aux = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=None if bias is None else biased,
        block_mask=mask,
        scale=scale,
        kernel_options=kernel_options(q.shape[-1], biased=bias is not None),
        return_aux=AuxRequest(lse=owed is not None),
    )
    y = y.transpose(1, 2)
    if owed is None:
        return y
    return with_bias_gradient(y, owed, q, k, v, aux.lse, marks, pairs, scale)


def kernel_options(width: int, *, biased: bool) -> dict[str, int]:
    """Stages and warps of FlexAttention's kernels that fit into an H100 and an A100.

    By default they fetch three tiles ahead, and where scores are scaled each pair's bias, too. In
    bf16 and with the tiles of torch 2.11 that asks for 246,784 bytes of shared memory forward at 64
    channels per head, 233,472 backward at 128 and, bias or not, 263,168 at 256, where an H100 has
    232,448. With a bias, 4 warps have too few registers for a tile forward (64 channels).

    Args:
        width: K.
        biased: with a bias.
    """
    if biased:
        return {"num_stages": 2, "fwd_num_warps": 8}
    return {"num_stages": 2} if width > 128 else {}
