"""Attention of a sliding window: ours, torch's FlashAttention-2 with a window, all keys by SDPA."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.throughput.fla_kernels import window_flash_attention
from evals.throughput.op_jobs import Job
from evals.throughput.op_rows import Op, OpRow, errors, time_op
from pretrain.ops.window_attention import window_attention, window_attention_naive

CHECKED_TOKENS, CHECKED_HEADS = 2048, 2  # the definition forms every score


@dataclass
class WindowAttentionOptions:
    """Sizes; `tokens` in all sequences together."""

    lengths: str = "2048,8192,32768,65536"
    tokens: int = 65536
    n_heads: int = 16
    head_dim: int = 64
    window: int = 512


def jobs(
    options: WindowAttentionOptions, lengths: list[int], device: torch.device
) -> Iterator[Job]:
    """Rows in bf16 on a GPU, in fp32 on a CPU."""
    w = options.window

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, block_size=w, reach="window")

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention_naive(q, k, v, block_size=w, reach="window")

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_flash_attention(q, k, v, causal=True, window_size=(w - 1, 0))

    def all_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    forms: dict[str, tuple[Op, Op | None]] = {
        f"window {w}": (ours, definition),
        "all keys, SDPA": (all_keys, None),
    }
    if device.type == "cuda":
        forms[f"window {w}, FlashAttention-2"] = flash, definition
    for length in lengths:
        for form, ops in forms.items():
            row = OpRow(form, length, max(1, options.tokens // length))
            yield Job(row, partial(_rows, row, *ops, options, device))


def _rows(
    row: OpRow,
    op: Op,
    definition: Op | None,
    options: WindowAttentionOptions,
    device: torch.device,
) -> list[OpRow]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (row.batch_size, row.length, options.n_heads, options.head_dim)
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    forward, both = time_op(op, inputs, device)
    row = row._replace(forward=forward, both=both)
    if definition is None:
        return [row]
    few = [x[:1, :CHECKED_TOKENS, :CHECKED_HEADS] for x in inputs]
    error, gradient_error = errors(op, definition, few)
    return [row._replace(error=error, gradient_error=gradient_error)]
