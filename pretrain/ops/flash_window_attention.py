"""Sliding windows and blocks by FlashAttention-4's own kernels for Hopper (package flash-attn-4).

Shapes: B batch, T queries, M cached keys in front of them, H heads, K head width, W block size, S
sequences of documents, N = B T.

A window needs no mask: the kernels align queries and keys at their ends and skip what is out of
reach. Documents are sequences of different lengths in one row of B T queries and one of B (M + T)
keys, where they lie as they are. How many sequences there are does not depend on the data: an edge
where no document begins makes an empty one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.kernel_packages import is_installed

FLASH_INSTALLED = is_installed("flash-attn-4")
SUMMED_WIDTH = 128  # of heads whose summed gradients `write_gradients` can hand out
_CALLING = threading.Lock()


def flash_serves(q: Tensor) -> bool:
    """Whether `flash_window_attention` takes queries (..., K): 16 bits, on Hopper, with the package
    installed. Heads of more than 128 channels are untried. Its backward adds up the queries'
    gradients in any order, so that deterministic runs go without."""
    return (
        FLASH_INSTALLED
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and not torch.are_deterministic_algorithms_enabled()
    )


def flash_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    reach: str,
    offset: int = 0,
    fresh: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Signature and meaning of `window_attention`, where `flash_serves`, without a bias: for the
    reach "window", and for "own" on whole blocks, each of which is a sequence then."""
    assert bias is None
    length, cached = q.shape[1], k.shape[1] - q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if reach == "own":  # where documents begin changes nothing
        assert offset == cached == length % block_size == 0
        blocks = (x.unflatten(1, (-1, block_size)).flatten(0, 1) for x in (q, k, v))
        return flash_window(*blocks, None, None, block_size, scale)[0].view(q.shape)
    assert reach == "window"
    q_starts = k_starts = None
    if fresh is not None and (cached or fresh.shape[1] > 1):
        q_starts, k_starts = document_starts(length, cached, block_size, offset, fresh)
    return flash_window(q, k, v, q_starts, k_starts, block_size, scale)[0]


def document_starts(
    length: int, cached: int, block_size: int, offset: int, fresh: Tensor
) -> tuple[Tensor, Tensor]:
    """Where each sequence begins among all queries and among all keys, and their numbers at the end
    (FlashAttention's cu_seqlens).

    In every row of the batch: what the cache holds of a document that has ended, keys without
    queries; the document of the first block, with what the cache holds of it; one sequence for each
    further block. Where none begins, the sequence in front is empty and its document goes on.

    Args:
        length: T.
        cached: M, at most W.
        block_size: W.
        offset: as in `window_attention`.
        fresh: as in `window_attention`.

    Returns:
        (S + 1,) int32 each, S = B * (1 + blocks in `fresh`).
    """
    assert cached <= block_size
    begins = F.pad(fresh, (1, 0), value=True)
    batch, marks = begins.shape
    row = torch.arange(batch, dtype=torch.int32, device=fresh.device).unsqueeze(1)
    block = torch.arange(marks, dtype=torch.int32, device=fresh.device) - 1
    token = block * block_size - offset  # of the row's own mark, the first: in front of the cache

    def starts(before: int) -> Tensor:
        total = before + length
        at = torch.where(begins, row * total + (before + token).clamp(min=0), 0)
        # Where none begins, the last that did: the sequence between the two is empty. The maximum
        # comes last because compiled blocks keep it for the backward, and would work out again what
        # followed it, just in front of a kernel that starts early and reads this before it waits.
        return F.pad(at.flatten(), (0, 1), value=batch * total).cummax(0).values

    return starts(0), starts(cached)


@torch.library.custom_op("longspan::flash_window", mutates_args=())
def flash_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, K); the logarithms of the sums, fp32, (B, H, T) or with documents (H, N)."""
    from flash_attn.cute.interface import _flash_attn_fwd

    y, sums, *_ = _flash_attn_fwd(
        *_rows(q_starts, q, k, v),
        cu_seqlens_q=q_starts,
        cu_seqlens_k=k_starts,
        softmax_scale=scale,
        window_size_left=block_size - 1,
        window_size_right=0,
        return_lse=True,
    )
    return y.view(q.shape), sums


@torch.library.custom_op("longspan::flash_window_backward", mutates_args=())
def _flash_window_backward(
    d_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    sums: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, contiguous."""
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    write_gradients(d_y, q, k, v, y, sums, q_starts, k_starts, block_size, scale, gradients)
    return gradients


def write_gradients(
    d_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    sums: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    block_size: int,
    scale: float,
    into: tuple[Tensor, ...],
    *,
    summed: bool = False,
) -> Tensor | None:
    """Fills `into`, three tensors like q, k and v, with their gradients. Heads may lie apart, rows
    of a batch one behind the other.

    With `summed`, of heads of `SUMMED_WIDTH` and without documents, that of q is left out, and
    returned as FlashAttention has added it up: (B, H, 128 * T rounded up to 64), fp32, in the order
    of `summed_heads_kernel`, and still without the factor `scale`.
    """
    from flash_attn.cute import interface

    if q_starts is not None:
        into = tuple(x.view(-1, *x.shape[2:]) for x in into)
    d_q, d_k, d_v = into
    with _CALLING, _kept_as_summed(interface, summed) as kept:
        interface._flash_attn_bwd(
            *_rows(q_starts, q, k, v, y, d_y.contiguous()),
            sums,
            cu_seqlens_q=q_starts,
            cu_seqlens_k=k_starts,
            softmax_scale=scale,
            window_size_left=block_size - 1,
            window_size_right=0,
            dq=d_q,
            dk=d_k,
            dv=d_v,
        )
    return kept[0] if summed else None


@contextmanager
def _kept_as_summed(interface: Any, summed: bool) -> Iterator[list[Tensor]]:
    """Holds what FlashAttention would convert next, the last kernel of its backward. There is no
    argument for that: its function is another one meanwhile."""
    kept: list[Tensor] = []
    convert = interface._bwd_postprocess_convert
    if summed:
        interface._bwd_postprocess_convert = lambda total, *_, **__: kept.append(total)
    try:
        yield kept
    finally:
        interface._bwd_postprocess_convert = convert


def _rows(starts: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, T, H, K), with documents as (N, H, K)."""
    return tensors if starts is None else tuple(x.flatten(0, 1) for x in tensors)


@flash_window.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_starts: Tensor | None,
    k_starts: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    shape = (batch, heads, length) if q_starts is None else (heads, batch * length)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@_flash_window_backward.register_fake
def _(d_y: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_starts, k_starts, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, q_starts, k_starts)


def _backward(ctx: Any, d_y: Tensor, d_sums: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _flash_window_backward(d_y, *ctx.saved_tensors, *ctx.numbers)
    return *gradients, None, None, None, None


flash_window.register_autograd(_backward, setup_context=_save)
