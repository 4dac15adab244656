"""Triton kernels of the elementwise part of cross-entropy, one program per token.

Shapes: M tokens, V vocabulary.

A vocabulary whose logits fit into the registers of a program is read once and written once; a
larger one is read twice, in blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 32 values of 4 bytes for each of 1,024 threads, which have 64 registers (sm_90: nothing spilled).
ROW_BYTES = 2**17
BLOCK = 8192  # otherwise; the second reading comes from the cache


@triton.jit
def _softmax_residual_of_row(
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
    at = tl.arange(0, BLOCK)
    x = tl.load(row + at, at < vocabulary, float("-inf")).to(WIDE)
    highest = tl.max(x, 0)
    wanted = tl.sum(tl.where(at == target, x, 0.0), 0)
    e = tl.exp(x - highest)
    total = tl.sum(e, 0)
    counted = tl.load(mask + token).to(WIDE)
    tl.store(nll + token, (tl.log(total) + highest - wanted) * counted)
    tl.store(factor + token, counted / total)
    e -= tl.where(at == target, total, 0.0)
    tl.store(row + at, e.to(logits.dtype.element_ty), at < vocabulary)


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
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), WIDE)
    total, wanted = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
    for first in range(0, vocabulary, BLOCK):  # each lane keeps its own maximum
        at = first + lane
        x = tl.load(row + at, at < vocabulary, float("-inf")).to(WIDE)
        higher = tl.maximum(largest, x)
        # Finite where both are -inf: a lane beyond the vocabulary in a first, short block.
        kept = tl.where(largest == float("-inf"), 0.0, tl.exp(largest - higher))
        added = tl.where(x == float("-inf"), 0.0, tl.exp(x - higher))
        total = total * kept + added
        largest = higher
        wanted += tl.where(at == target, x, 0.0)
    highest = tl.max(largest, 0)
    total = tl.sum(tl.where(total == 0.0, 0.0, total * tl.exp(largest - highest)), 0)
    counted = tl.load(mask + token).to(WIDE)
    tl.store(nll + token, (tl.log(total) + highest - tl.sum(wanted, 0)) * counted)
    tl.store(factor + token, counted / total)
    for first in range(0, vocabulary, BLOCK):
        at = first + lane
        x = tl.load(row + at, at < vocabulary, float("-inf")).to(WIDE)
        e = tl.exp(x - highest) - tl.where(at == target, total, 0.0)
        tl.store(row + at, e.to(logits.dtype.element_ty), at < vocabulary)


def softmax_residual_(logits: Tensor, targets: Tensor, mask: Tensor, nll: Tensor) -> Tensor:
    """Losses from logits and, in place of the logits, their derivatives but for a factor per row.

    Args:
        logits: (M, V), innermost contiguous; overwritten.
        targets: (M,) int64 in [0, V).
        mask: (M,) bool, True where the token counts.
        nll: (M,), at least fp32, which is what is computed in; filled here, 0 where not counted.

    Returns:
        (M,) like `nll`: d nll / d logits = factor x what is left in `logits`.
    """
    factor = torch.empty_like(nll)
    row = triton.next_power_of_2(logits.shape[1])
    in_registers = row * nll.element_size() <= ROW_BYTES
    kernel = _softmax_residual_of_row if in_registers else _softmax_residual
    with torch.cuda.device_of(logits):
        kernel[(len(logits),)](
            logits,
            targets,
            mask,
            nll,
            factor,
            logits.shape[1],
            logits.stride(0),
            WIDE=tl.float64 if nll.dtype == torch.float64 else tl.float32,
            BLOCK=row if in_registers else BLOCK,
            num_warps=min(32, max(1, row // 1024)) if in_registers else 16,
        )
    return factor
