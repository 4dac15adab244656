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
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    # A constant here: FlexAttention would give it a gradient by atomics. Tensor cores start from
    # it, in the registers of their results, if nothing comes between product and sum; with scores
    # scaled before, it goes through shared memory.
    added = None if bias is None else bias.detach() / factor

    def biased(product: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert added is not None
        place = query + pairs.cached - key - pairs.first_distance
        return (product + added[h, place.clamp(0, added.shape[1] - 1)]) * factor

    owed = bias if bias is not None and bias.requires_grad and torch.is_grad_enabled() else None
    y, aux = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=None if bias is None else biased,
        block_mask=mask,
        scale=factor if bias is None else 1.0,
        kernel_options=kernel_options(q, biased=bias is not None),
        return_aux=AuxRequest(lse=owed is not None),
    )
    y = y.transpose(1, 2)
    if owed is None:
        return y
    return with_bias_gradient(y, owed, q, k, v, aux.lse, marks, pairs, factor)


def kernel_options(q: Tensor, *, biased: bool) -> dict[str, int]:
    """Stages, tiles and warps of FlexAttention's kernels where torch 2.11's do not do.

    Args:
        q: as in `flex_with_bias`.
        biased: with a bias.
    """
    options = {}
    if q.shape[-1] > 128:
        # Three tiles ahead are 263,168 bytes of shared memory in bf16; an H100 has 232,448.
        options["num_stages"] = 2
    if biased and q.element_size() == 2:
        # Its own tiles, 128 x 128 of 64 channels, leave 4 warps too few registers for a bias.
        options |= {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_warps": 4}
    return options
