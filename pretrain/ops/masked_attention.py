"""Softmax attention, with a mask by any fused kernel but cuDNN's.

Shapes: B batch, H heads, T queries, S keys, K head width.

cuDNN's backward gave NaN gradients and illegal memory accesses for masks whose rows begin with
whole tiles of hidden keys, as windows have (torch 2.11, bf16, H200; its place was found by
anomaly mode). PyTorch prefers cuDNN on Hopper, so leaving the choice to it is not safe.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SAFE_WITH_MASKS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    *,
    causal: bool = True,
) -> Tensor:
    """Attention of q (B, H, T, K) to k, v (B, H, S, K).

    Args:
        q: queries.
        k: keys.
        v: values.
        mask: broadcasts to (B, H, T, S): bool, True where visible, or what is added to the scores,
            in the dtype of q; None: see `causal`.
        scale: of the scores; None: 1 / sqrt(K).
        causal: what no mask means: the keys so far, with T == S; False: all keys.

    Returns:
        (B, H, T, K).
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    with sdpa_kernel(SAFE_WITH_MASKS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
