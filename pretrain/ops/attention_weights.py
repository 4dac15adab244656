"""Softmax over scores that come in parts, for products with the values of each part.

    w_p = exp(s_p) / sum_p sum_j exp(s_pj)     over all parts p of a row
    d s_p = w_p (d w_p - sum_p sum_j w_pj d w_pj)

The weights are kept once, in the dtype in which a product takes them, and the derivative is that of
these weights: autograd would keep wide scores or weights beside them. Parts are not joined, for
inductor would write the joined scores, which are wide, and read them twice; and each part has a
maximum of its own, so that what one part needs of another is one number per row.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


def attention_weights(scores: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One softmax over the last axes of all parts.

    Args:
        scores: the parts, (..., J_p) each, of one dtype, at least fp32; -inf hides.
        dtype: of the weights.

    Returns:
        The weights of each part, like `scores`.
    """
    return _attention_weights(dtype, *scores)


# As a whole in a compiled graph: see `pretrain.ops.qkv_heads`.
@torch.compiler.allow_in_graph
def _attention_weights(dtype: torch.dtype, *scores: Tensor) -> tuple[Tensor, ...]:
    return _AttentionWeights.apply(dtype, *scores)


class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *scores: Tensor) -> tuple[Tensor, ...]:
        finite = torch.finfo(scores[0].dtype).min  # of a part that is hidden whole
        peaks = [part.amax(-1, keepdim=True).clamp(min=finite) for part in scores]
        powers = [(part - peak).exp() for part, peak in zip(scores, peaks, strict=True)]
        highest = reduce(torch.maximum, peaks)
        shares = [(peak - highest).exp() for peak in peaks]
        sums = [power.sum(-1, keepdim=True) for power in powers]
        total = sum(share * own for share, own in zip(shares, sums, strict=True))
        weights = tuple(
            (power * (share / total)).to(dtype) for power, share in zip(powers, shares, strict=True)
        )
        ctx.wide = highest.dtype
        ctx.save_for_backward(*weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, above, strict=True)
        parts = [(w.to(ctx.wide), d.to(ctx.wide)) for w, d in pairs]
        along = sum((w * d).sum(-1, keepdim=True) for w, d in parts)
        return None, *(w * (d - along) for w, d in parts)
