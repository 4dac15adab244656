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
from pretrain.ops.quack_products import quack_is_faster, write_product


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

    Raises:
        ValueError: in fp16.
    """
    dtype = matmul_dtype(hidden)
    if dtype == torch.float16:
        raise ValueError(
            "linear_cross_entropy: hidden is multiplied in float16, in which gradients do not fit "
            "before sums over the vocabulary divide them; use bfloat16 or float32"
        )
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss_sum, nll = _LinearCrossEntropy.apply(
        hidden, weight, targets, mask, chunk_size, dtype, needs_gradient
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
            # Buffers for all chunks: fresh ones cost page faults on a CPU.
            logits = hidden.new_empty(rows, len(weight), dtype=dtype)
            buffer = logits
            if dtype != wide and not hidden.is_cuda:
                buffer = torch.empty_like(logits, dtype=wide)
            for start in range(0, tokens, chunk_size):
                part = slice(start, start + chunk_size)
                h = hidden[part].to(dtype)
                logits, buffer = logits[: len(h)], buffer[: len(h)]
                _write_product(h, w.T, logits)
                factor = _softmax_residual_(logits, targets[part], mask[part], nll[part], buffer)
                if d_hidden is None or d_weight is None:
                    continue
                # Rounded as they are written: as a result of its own a product would be wide.
                torch.mul(logits @ w, factor, out=d_hidden[part])
                scaled = torch.mul(h, factor, out=torch.empty_like(h))
                add_product_(d_weight, logits.T, scaled)
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


def _write_product(a: Tensor, b: Tensor, y: Tensor) -> None:
    if quack_is_faster(a, b):
        write_product(a, b, y)
    else:
        torch.mm(a, b, out=y)


@torch.library.custom_op("longspan::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where `total` may be wider; on a GPU in the product itself. No derivative.

    An operator because torch 2.11 fails to trace an addmm whose result is wider than its factors:
    it takes the result's dtype for the factor of `total`.
    """
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@add_product_.register_fake
def _(total: Tensor, a: Tensor, b: Tensor) -> None:
    return None


def _softmax_residual_(
    logits: Tensor, targets: Tensor, mask: Tensor, nll: Tensor, buffer: Tensor
) -> Tensor:
    """Fills nll; turns logits into their derivatives but for a factor per row.

    Division and mask are left to the narrow factors of the two products that follow.

    Args:
        logits: (M, V).
        targets: (M,).
        mask: (M,).
        nll: (M,) in at least fp32.
        buffer: like `logits` in the dtype of `nll`, may be `logits`; not used on a GPU.

    Returns:
        (M, 1): d nll / d logits = factor x what is left in `logits`.
    """
    if logits.is_cuda:
        from pretrain.ops.cross_entropy_kernel import softmax_residual_

        return softmax_residual_(logits, targets, mask, nll).unsqueeze(1)
    index, e = targets.unsqueeze(1), buffer
    if logits.dtype != e.dtype:
        e.copy_(logits)
    largest, wanted = e.amax(-1, keepdim=True), e.gather(1, index)
    total = e.sub_(largest).exp_().sum(-1, keepdim=True)
    nll.copy_((total.log() + largest - wanted).squeeze(1) * mask)
    # d nll / d logits = e / total - onehot.
    e.scatter_add_(1, index, -total)
    if logits.dtype != e.dtype:
        logits.copy_(e)
    return mask.unsqueeze(1) / total


def linear_cross_entropy_naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, *, chunk_size: int = 4096
) -> CrossEntropy:
    """All logits at once: the definition. Signature of `linear_cross_entropy`."""
    del chunk_size
    logits = F.linear(hidden, weight).to(wide_dtype(hidden))
    nll = F.cross_entropy(logits, targets, reduction="none") * mask
    return CrossEntropy(nll.sum(), nll.detach())
