"""Chunked linear cross-entropy: next-token loss without ever holding the logits.

Shapes: M tokens, D model width, V vocabulary.

The gradient of a sum of losses needs only a scalar from above, so it is computed in the forward,
while a chunk's probabilities are at hand, and the backward merely scales it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.numerics import matmul_dtype, no_autocast, wide_dtype


class CrossEntropy(NamedTuple):
    """loss_sum: scalar, nats, summed over counted tokens. nll: (M,), 0 where not counted; it
    carries no gradient. Both in at least fp32."""

    loss_sum: Tensor
    nll: Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, chunk_size: int = 4096
) -> CrossEntropy:
    """Cross-entropy of softmax(hidden weight^T), `chunk_size` tokens at a time.

    Args:
        hidden: (M, D).
        weight: (V, D), the head.
        targets: (M,) int64; entries where `mask` is False may be anything in [0, V).
        mask: (M,) bool, True where the token counts.
        chunk_size: tokens whose logits, (chunk_size, V), exist at one time.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss_sum, nll = _LinearCrossEntropy.apply(
        hidden, weight, targets, mask, chunk_size, matmul_dtype(hidden), needs_gradient
    )
    return CrossEntropy(loss_sum, nll)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        mask: Tensor,
        chunk_size: int,
        dtype: torch.dtype,
        needs_gradient: bool,
    ):
        with no_autocast(hidden):
            wide, tokens, rows = wide_dtype(hidden), hidden.shape[0], min(chunk_size, len(hidden))
            w = weight.to(dtype)
            nll = torch.empty(tokens, dtype=wide, device=hidden.device)
            d_hidden = torch.empty_like(hidden) if needs_gradient else None
            d_weight = torch.zeros_like(weight, dtype=wide) if needs_gradient else None
            # Two buffers for all chunks (one if the dtypes agree): fresh ones cost page faults.
            narrow = hidden.new_empty(rows, len(weight), dtype=dtype)
            e = narrow if dtype == wide else torch.empty_like(narrow, dtype=wide)
            for start in range(0, tokens, chunk_size):
                part = slice(start, start + chunk_size)
                h, index = hidden[part].to(dtype), targets[part, None]
                narrow, e = narrow[: len(h)], e[: len(h)]
                torch.mm(h, w.T, out=narrow)
                if dtype != wide:
                    e.copy_(narrow)
                largest, wanted = e.amax(-1, keepdim=True), e.gather(1, index)
                total = e.sub_(largest).exp_().sum(-1, keepdim=True)
                nll[part] = (total.log() + largest - wanted).squeeze(1) * mask[part]
                if d_hidden is None or d_weight is None:
                    continue
                # d nll / d logits = e / total - onehot. Division and mask are left to the narrow
                # factors of the two products.
                e.scatter_add_(1, index, -total)
                if dtype != wide:
                    narrow.copy_(e)
                counts = mask[part, None] / total
                d_hidden[part] = (narrow @ w) * counts
                d_weight += narrow.T @ (h * counts).to(dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor, d_nll: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        d_weight = (d_weight * d_loss).to(ctx.weight_dtype)
        return (d_hidden * d_loss).to(d_hidden.dtype), d_weight, None, None, None, None, None


def linear_cross_entropy_naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, chunk_size: int = 4096
) -> CrossEntropy:
    """All logits at once: the definition. Signature of `linear_cross_entropy`."""
    del chunk_size
    logits = F.linear(hidden, weight).to(wide_dtype(hidden))
    nll = F.cross_entropy(logits, targets, reduction="none") * mask
    return CrossEntropy(nll.sum(), nll.detach())
