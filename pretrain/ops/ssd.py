"""State-space duality: a matrix-valued state with one decay per head (Dao & Gu 2024, 2405.21060).

    S_t = exp(l_t) S_{t-1} + step_t u_t b_t^T ;  y_t = S_t c_t + skip u_t

Shapes: B batch, T time, H heads, P head width, G groups (of H / G heads with the same b and c),
N state size, C chunk size.

`ssd` is the chunked form: inside a chunk this *is* attention without a softmax, with scores
c_t . b_s times the decay exp(l_{s+1} + ... + l_t), so almost all of the work is matmuls. Forms:

- on a GPU in 16 bits and at the usual sizes, an operator that keeps nothing but its inputs for the
  backward;
- else torch's products. There sums of log decays are formed as masked cumulative sums: as
  differences of one cumulative sum they lose the digits that decide between recent tokens.
"""

from typing import Any

import torch
from torch import Tensor

from pretrain.ops.chunks import chunk_runs, kept_states
from pretrain.ops.numerics import no_autocast, wide_dtype


def ssd(
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The chunked matmul form, linear in T; the default.

    Args:
        u: (B, T, H, P).
        step: (B, T, H), what is written of it, in at least fp32.
        log_decay: (B, T, H), at most 0, in at least fp32.
        b: (B, T, G, N), where it is written.
        c: (B, T, G, N), what is read.
        skip: (H,), what passes the state by.
        state: (B, H, P, N) in at least fp32, the state after the previous token; None: zero.
        resets: (B, n) bool, True where the state is zeroed before the token at that edge.
        edges: the n token offsets of `resets`; their spacing is a multiple of `chunk_size`.
        chunk_size: tokens per chunk; changes the speed, not the result. The operator has its own.

    Returns:
        y like `u`, and the state after the last token, (B, H, P, N).

    Raises:
        ValueError: `chunk_size` does not divide the spacing of the edges.
    """
    if u.is_cuda and u.element_size() < 4 and has_kernels(u.shape[3], b.shape[3]):
        return fused_ssd(u, step, log_decay, b, c, skip, state, resets=resets, edges=edges)
    outputs = []
    with no_autocast(u):
        log_decay, skip = log_decay.to(wide_dtype(u)), skip.to(wide_dtype(u))
        written = (step.unsqueeze(-1) * u).to(u.dtype)
        for start, stop, size in chunk_runs(u.shape[1], chunk_size, resets, edges):
            keep = kept_states(resets, edges, start, stop, size)
            run = [x[:, start:stop].unflatten(1, (-1, size)) for x in (written, log_decay, b, c)]
            y, state = _chunks(run[0], run[1], run[2], run[3], state, keep)
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        y = (y + skip.unsqueeze(-1) * u).to(u.dtype)
    assert state is not None
    return y, state


def has_kernels(width: int, d_state: int) -> bool:
    """Whether the operator takes heads of `width` channels and states of `d_state` numbers.

    Powers of two up to the largest that it was seen right at on a GPU. With heads of 48 and states
    of 256 its gradients of b and c were off by half and more on an H100 (Triton 3.6), though right
    in Triton's interpreter.
    """
    powers_of_two = width & (width - 1) == 0 == d_state & (d_state - 1)
    return powers_of_two and d_state <= 128 and width * d_state <= 64 * 128


def _chunks(
    u: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """J whole chunks: u (B, J, C, H, P), log_decay (B, J, C, H), b and c (B, J, C, G, N); y in the
    dtype of `log_decay`."""
    batch, _, _, n_heads, width = u.shape
    groups, d_state = b.shape[-2:]
    wide = log_decay.dtype
    per_group = (groups, n_heads // groups)
    u = u.permute(0, 1, 3, 2, 4)  # (B, J, H, C, P)
    b, c = (x.transpose(2, 3) for x in (b, c))  # (B, J, G, C, N)
    decay = _decay_between(log_decay.transpose(2, 3))  # (B, J, H, C, C)
    since_start = log_decay.transpose(2, 3).cumsum(-1).exp()  # (B, J, H, C)

    scores = (c @ b.transpose(-1, -2)).unsqueeze(3) * decay.unflatten(2, per_group)
    y = scores.flatten(2, 3).to(u.dtype) @ u

    # Heads of a group share b and c: they are the rows of one product.
    written = (u * decay[..., -1, :, None]).to(u.dtype).unflatten(2, per_group)
    written = written.permute(0, 1, 2, 3, 5, 4).flatten(3, 4)  # (B, J, G, H/G P, C)
    local = (written @ b).to(wide).view(batch, -1, n_heads, width, d_state)
    if state is None:
        state = local.new_zeros(batch, n_heads, width, d_state)
    before, state = ssd_scan(local, since_start[..., -1], state.to(wide), keep)
    memory = before.to(u.dtype).unflatten(2, per_group).flatten(3, 4)  # (B, J, G, H/G P, N)
    read = (c @ memory.transpose(-1, -2)).unflatten(-1, (per_group[1], width))
    read = read.permute(0, 1, 2, 4, 3, 5).flatten(2, 3)  # (B, J, H, C, P)
    y = y + read * since_start.unsqueeze(-1)
    return y.transpose(2, 3).flatten(1, 2), state


def _decay_between(log_decay: Tensor) -> Tensor:
    """(..., C) -> (..., C, C), entry [t, s] = exp(l_{s+1} + ... + l_t) for t >= s, else 0."""
    size = log_decay.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril(-1)
    sums = log_decay.unsqueeze(-1).masked_fill(~later, 0).cumsum(-2)
    return sums.exp().tril()


@torch.library.custom_op("longspan::ssd_scan", mutates_args=())
def ssd_scan(local: Tensor, decay: Tensor, s: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """before_{j+1} = decay_j before_j + local_j over chunks.

    An operator of its own, because a compiler would unroll the loop.

    Args:
        local: (B, J, H, P, N), what each of J chunks adds.
        decay: (B, J, H).
        s: (B, H, P, N), the state before the first chunk.
        keep: (B, J) bool, False where the state is zeroed before a chunk.

    Returns:
        The states before each chunk, like `local`, and the state after the last one.
    """
    local, before = local.contiguous(), local.new_empty(local.shape)
    for j in range(local.shape[1]):
        before[:, j] = s if keep is None else s * keep[:, j, None, None, None]
        s = torch.addcmul(local[:, j], decay[:, j, :, None, None], before[:, j])
    return before, s


@torch.library.custom_op("longspan::ssd_scan_backward", mutates_args=())
def _ssd_scan_backward(
    d_before: Tensor, d_s: Tensor, before: Tensor, decay: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan from the right: gradients of local, decay and s."""
    d_before, now = d_before.contiguous(), d_s.contiguous()
    d_local = before.new_empty(before.shape)
    for j in reversed(range(before.shape[1])):
        d_local[:, j] = now
        now = torch.addcmul(d_before[:, j], decay[:, j, :, None, None], now)
        if keep is not None:
            now = now * keep[:, j, None, None, None]
    return d_local, (before * d_local).sum((-2, -1)), now


@ssd_scan.register_fake
def _(local: Tensor, decay: Tensor, s: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    return local.new_empty(local.shape), s.new_empty(s.shape)


@_ssd_scan_backward.register_fake
def _(
    d_before: Tensor, d_s: Tensor, before: Tensor, decay: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return before.new_empty(before.shape), decay.new_empty(decay.shape), d_s.new_empty(d_s.shape)


def _save_for_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], inputs[1], inputs[3])


def _backward_of_scan(ctx: Any, d_before: Tensor, d_s: Tensor) -> tuple[Tensor | None, ...]:
    before, decay, keep = ctx.saved_tensors
    return *_ssd_scan_backward(d_before, d_s, before, decay, keep), None


ssd_scan.register_autograd(_backward_of_scan, setup_context=_save_for_scan)


def fused_ssd(
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The operator; documents may begin anywhere. Signature of `ssd`."""
    del chunk_size
    step, log_decay, skip = (x.float() for x in (step, log_decay, skip))
    if resets is not None:
        starts = torch.zeros(log_decay.shape[:2], dtype=torch.bool, device=u.device)
        starts[:, edges.start :: edges.step] = resets
        log_decay = log_decay.masked_fill(starts.unsqueeze(-1), -torch.inf)
    state = None if state is None else state.float()
    return ssd_whole(u, step, log_decay, b.to(u.dtype), c.to(u.dtype), skip, state)


@torch.library.custom_op("longspan::ssd", mutates_args=())
def ssd_whole(
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `ssd_kernels.ssd_forward`."""
    from pretrain.ops.ssd_kernels import ssd_forward

    return ssd_forward(u, step, log_decay, b, c, skip, state)


@torch.library.custom_op("longspan::ssd_backward", mutates_args=())
def _ssd_whole_backward(
    dy: Tensor,
    d_last: Tensor,
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None,
) -> list[Tensor]:
    """See `ssd_kernels.ssd_backward`."""
    from pretrain.ops.ssd_kernels import ssd_backward

    return ssd_backward(dy, d_last, u, step, log_decay, b, c, skip, state)


@ssd_whole.register_fake
def _(
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, _, n_heads, width = u.shape
    return u.new_empty(u.shape), log_decay.new_empty(batch, n_heads, width, b.shape[3])


@_ssd_whole_backward.register_fake
def _(
    dy: Tensor,
    d_last: Tensor,
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (u, step, log_decay, b, c, skip, d_last)]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward_of_whole(ctx: Any, dy: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    *gradients, d_state = _ssd_whole_backward(dy, d_last, *inputs)
    return *gradients, None if inputs[6] is None else d_state


ssd_whole.register_autograd(_backward_of_whole, setup_context=_save_inputs)


def ssd_naive(
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: the definition. Signature of `ssd`."""
    del chunk_size
    n_heads, groups = u.shape[2], b.shape[2]
    with no_autocast(u):
        wide = wide_dtype(u)
        b, c = (x.to(wide).repeat_interleave(n_heads // groups, 2) for x in (b, c))
        u_wide, decay = u.to(wide), log_decay.to(wide).exp()
        written, passed = step.to(wide).unsqueeze(-1) * u_wide, skip.to(wide).unsqueeze(-1) * u_wide
        if state is None:
            state = written.new_zeros(u.shape[0], *u.shape[2:], b.shape[-1])
        outputs = []
        for t in range(u.shape[1]):
            if resets is not None and t in edges:
                state = state * ~resets[:, edges.index(t), None, None, None]
            new = written[:, t].unsqueeze(-1) * b[:, t].unsqueeze(-2)
            state = decay[:, t, :, None, None] * state + new
            outputs.append((state @ c[:, t].unsqueeze(-1)).squeeze(-1) + passed[:, t])
    return torch.stack(outputs, 1).to(u.dtype), state
