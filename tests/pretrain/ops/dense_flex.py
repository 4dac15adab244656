"""FlexAttention as torch would write it out: all scores, and gradients on a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask


def dense_flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: Any,
    block_mask: BlockMask,
    scale: float | None,
    kernel_options: object,
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]:
    """In place of `flex_attention`, of which these are the arguments."""
    b, h, query, key = (
        torch.arange(size, device=q.device).view([-1 if i == axis else 1 for i in range(4)])
        for axis, size in enumerate((*q.shape[:3], k.shape[2]))
    )
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if score_mod is not None:
        scores = score_mod(scores, b, h, query, key)
    scores = scores.masked_fill(~block_mask.mask_mod(b, h, query, key), -torch.inf)
    lse = scores.logsumexp(-1) if return_aux.lse else None
    return scores.softmax(-1).to(v.dtype) @ v, AuxOutput(lse=lse)
