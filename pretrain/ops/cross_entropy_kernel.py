"""Triton kernel of the elementwise part of cross-entropy, one program per token.

Shapes: M tokens, V vocabulary.

A row of logits is read three times, of which the second and the third come from the cache: held in
registers it would leave a multiprocessor no room for another row, whose reading hides the sums of
this one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192  # logits at a time
WARPS = 16  # with 40 registers for each thread three rows fit in a multiprocessor (sm_90)


@triton.jit
def _softmax_residual(
    logits,
    targets,
    mask,
    nll,
    factor,
    vocabulary,
    row_stride,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    target = tl.load(targets + token)
    wanted = tl.load(row + target).to(WIDE)  # in all threads, well before one of them overwrites it
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), WIDE)
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        x = tl.load(row + at, at < vocabulary, float("-inf")).to(WIDE)
        largest = tl.maximum(largest, x)
    highest = tl.max(largest, 0)
    totals = tl.zeros([BLOCK], WIDE)
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        x = tl.load(row + at, at < vocabulary, float("-inf")).to(WIDE)
        totals += tl.exp(x - highest)
    total = tl.sum(totals, 0)
    counted = tl.load(mask + token).to(WIDE)
    tl.store(nll + token, (tl.log(total) + highest - wanted) * counted)
    tl.store(factor + token, counted / total)
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        x = tl.load(row + at, at < vocabulary, float("-inf")).to(WIDE)
        e = tl.exp(x - highest) - tl.where(at == target, total, 0.0)
        tl.store(row + at, e.to(logits.dtype.element_ty), at < vocabulary)


@torch.library.custom_op("longspan::softmax_residual_", mutates_args=("logits", "nll"))
def softmax_residual_(logits: Tensor, targets: Tensor, mask: Tensor, nll: Tensor) -> Tensor:
    """Losses from logits and, in place of the logits, their derivatives but for a factor per row.

    Args:
        logits: (M, V), innermost contiguous; overwritten.
        targets: (M,) int64 in [0, V).
        mask: (M,) bool, True where the token counts.
        nll: (M,), contiguous, at least fp32, which is what is computed in; filled here, 0 where
            not counted.

    Returns:
        (M,) like `nll`: d nll / d logits = factor x what is left in `logits`.
    """
    factor = torch.empty_like(nll)
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    with torch.cuda.device_of(logits):
        _softmax_residual[(len(logits),)](
            logits,
            targets.contiguous(),
            mask.contiguous(),
            nll,
            factor,
            logits.shape[1],
            logits.stride(0),
            WIDE=tl.float64 if nll.dtype == torch.float64 else tl.float32,
            BLOCK=block,
            num_warps=max(1, WARPS * block // BLOCK),
        )
    return factor


@softmax_residual_.register_fake
def _(logits: Tensor, targets: Tensor, mask: Tensor, nll: Tensor) -> Tensor:
    return torch.empty_like(nll)
