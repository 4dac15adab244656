"""Tokens to rows of chunks per channel, for products that all chunks of a channel share, and back.

Shapes: B batch, T time, D channels, C chunk size, J = T / C chunks.

Operators, because inductor would write one copy of the rows per product, and each in the layout of
the tokens, which the product then copies once more.
"""

from typing import Any

import torch
from torch import Tensor


def transpose_rows(u: Tensor, into: Tensor) -> None:
    """u (B, T, D), of any strides -> into (D, B * J, C), innermost contiguous."""
    if u.device.type == "cuda":
        from pretrain.ops.scan_kernels import transpose_into

        transpose_into(u, into)
    else:
        into.copy_(u.permute(2, 0, 1).reshape(into.shape))


@torch.library.custom_op("longspan::channel_rows", mutates_args=())
def channel_rows(u: Tensor, size: int) -> Tensor:
    """(B, T, D) -> (D, B * J, C) contiguous, C = size."""
    batch, length, channels = u.shape
    rows = u.new_empty(channels, batch * (length // size), size)
    with torch.cuda.device_of(u):
        transpose_rows(u, rows)
    return rows


@channel_rows.register_fake
def _(u: Tensor, size: int) -> Tensor:
    return u.new_empty(u.shape[2], u.shape[0] * (u.shape[1] // size), size)


def _save_batch(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.batch = inputs[0].shape[0]


def _gradient(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
    return _tokens(d_rows, ctx.batch), None


channel_rows.register_autograd(_gradient, setup_context=_save_batch)


# A view, which an operator may not return; as a whole in a compiled graph: see
# `pretrain.ops.qkv_heads`.
@torch.compiler.allow_in_graph
def tokens_of_rows(rows: Tensor, batch: int) -> Tensor:
    """(D, B * J, C) contiguous -> (B, T, D), a view; gradients come back as `channel_rows`."""
    return _TokensOfRows.apply(rows, batch)


class _TokensOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, batch: int) -> Tensor:
        ctx.size = rows.shape[2]
        return _tokens(rows, batch)

    @staticmethod
    def backward(ctx: Any, d_tokens: Tensor) -> tuple[Tensor, None]:
        return channel_rows(d_tokens, ctx.size), None


def _tokens(rows: Tensor, batch: int) -> Tensor:
    return rows.reshape(rows.shape[0], batch, -1).permute(1, 2, 0)
