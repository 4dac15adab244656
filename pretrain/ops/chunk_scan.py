"""The scan over chunks of diagonal state-space ops, whose products do the rest.

    s_{j+1} = decay s_j + local_j          elementwise; where a document begins s_j is zero

Shapes: B batch, D channels, J chunks, N modes. Complex modes are trailing (re, im) pairs, and so
are their decays and states: (D, B, J, N, 2) where real ones are (D, B, J, N).
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("longspan::chunk_scan", mutates_args=())
def chunk_scan(
    local: Tensor, decay: Tensor, s: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states before each chunk and the last one.

    An operator of its own, because inductor generates no code for complex numbers and would unroll
    the loop.

    Args:
        local: (D, B, J, N[, 2]), what each of J chunks adds.
        decay: (D, N[, 2]).
        s: (D, B, N[, 2]), the state before the first chunk.
        keep: (B, J) bool, False where the state is zeroed before a chunk; None: nowhere.

    Returns:
        The states before each chunk, like `local`, and the last one, like `s`.
    """
    rows = _rows(local)
    before = torch.empty_like(rows)
    with torch.cuda.device_of(local):
        last = scan_into(rows, decay, s, keep, before)
    return before.view(local.shape), last


@torch.library.custom_op("longspan::chunk_scan_backward", mutates_args=())
def _chunk_scan_backward(
    d_before: Tensor, d_s: Tensor, before: Tensor, decay: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan from the right with the conjugate decay: gradients of local, decay and s."""
    rows = _rows(d_before)
    d_local = torch.empty_like(rows)
    with torch.cuda.device_of(d_before):
        d_start = scan_into(rows, decay, d_s, keep, d_local, reverse=True)
    d_local = d_local.view(before.shape)
    if decay.dim() == 2:
        return d_local, (before * d_local).sum((1, 2)), d_start
    states, gradients = torch.view_as_complex(before), torch.view_as_complex(d_local)
    d_decay = (states.conj() * gradients).sum((1, 2))
    return d_local, torch.view_as_real(d_decay), d_start


def _rows(x: Tensor) -> Tensor:
    """(D, B, J, N[, 2]) -> (D, B * J, N[ * 2]), contiguous."""
    return x.contiguous().flatten(3).flatten(1, 2)


def scan_into(
    local: Tensor,
    decay: Tensor,
    s: Tensor,
    keep: Tensor | None,
    before: Tensor,
    *,
    reverse: bool = False,
) -> Tensor:
    """The scan itself: keep_j s_j is written into `before`.

    Args:
        local: (D, B * J, W), W words of N modes, contiguous; at least fp32.
        decay: (D, N[, 2]).
        s: (D, B, N[, 2]), the state before the first chunk.
        keep: (B, J) bool, False where the state is zeroed before a chunk; None: nowhere.
        before: like `local` in any floating dtype, innermost contiguous; filled here.
        reverse: the adjoint, from gradients of `before` and of the last state to those of `local`:
            g_j = keep_j (conj(decay) g_{j+1} + local_j) with g_J = s; g_{j+1} is written.

    Returns:
        The state after the last chunk, like `s`; g_0 in reverse.
    """
    if local.device.type == "cuda":
        from pretrain.ops.scan_kernels import scan_chunks

        return scan_chunks(local, decay, s, keep, before, reverse=reverse)
    x, a, now = local.unflatten(1, (s.shape[1], -1)), decay.unsqueeze(1), s.contiguous()
    if decay.dim() == 3:
        x = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        a, now = torch.view_as_complex(a.contiguous()), torch.view_as_complex(now)
    states, chunks = torch.empty_like(x), range(x.shape[2])
    if reverse:
        a, chunks = a.conj().resolve_conj(), chunks[::-1]
    for j in chunks:
        kept = 1 if keep is None else keep[:, j, None]
        if reverse:
            states[:, :, j] = now
            now = torch.addcmul(x[:, :, j], a, now) * kept
        else:
            states[:, :, j] = now = now * kept
            now = torch.addcmul(x[:, :, j], a, now)
    if decay.dim() == 3:
        states, now = torch.view_as_real(states).flatten(3), torch.view_as_real(now)
    before.copy_(states.flatten(1, 2))
    return now


@chunk_scan.register_fake
def _(local: Tensor, decay: Tensor, s: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    return local.new_empty(local.shape), s.new_empty(s.shape)


@_chunk_scan_backward.register_fake
def _(
    d_before: Tensor, d_s: Tensor, before: Tensor, decay: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_local = d_before.new_empty(d_before.shape)
    return d_local, decay.new_empty(decay.shape), d_s.new_empty(d_s.shape)


def _save_for_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], inputs[1], inputs[3])


def _backward_of_scan(ctx: Any, d_before: Tensor, d_s: Tensor) -> tuple[Tensor | None, ...]:
    before, decay, keep = ctx.saved_tensors
    return *_chunk_scan_backward(d_before, d_s, before, decay, keep), None


chunk_scan.register_autograd(_backward_of_scan, setup_context=_save_for_scan)
