"""Several read-outs of a diagonal LTI system, at the last token of each block only.

    s_t = z s_{t-1} + u_t ;  y_e = 2 Re(c_f . s_e) + D_f u_e      f = 1..F, e a block's last token

(Block-State Transformer, variant MF.) The states at block ends suffice, so neither the outputs in
between nor anything of size (T, D, F) is ever made; see pretrain/ops/lti_ssm.py for z and c.
Shapes: B batch, T time, D channels, N complex modes, F read-outs, E block ends inside the call.
"""

import torch
from torch import Tensor

from pretrain.ops.chunk_scan import chunk_scan
from pretrain.ops.chunks import kept_states
from pretrain.ops.lti_ssm import (
    SSMParameters,
    discretise,
    lti_ssm_naive,
    mode_powers,
)
from pretrain.ops.numerics import no_autocast, wide_dtype
from pretrain.ops.window_attention import query_runs


def lti_block_ends(
    u: Tensor,
    parameters: SSMParameters,
    state: Tensor | None = None,
    *,
    block_size: int,
    offset: int = 0,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """What the F read-outs say at the end of each block.

    Args:
        u: (B, T, D).
        parameters: as for `lti_ssm`, but C (F, D, N, 2) and D (F, D).
        state: (B, D, 2, N) in at least fp32, the state after the previous token; None: zero.
        block_size: tokens per block.
        offset: tokens of the first block that came before this call.
        resets: (B, n) bool, True where the state is zeroed before the token at that edge.
        edges: the n token offsets of `resets`; they lie on starts of blocks.
        chunk_size: tokens per chunk, a divisor of `block_size`; changes the speed only.

    Returns:
        y (B, E, F, D) in the dtype of `u`, and the state after the last token, (B, D, 2, N).
    """
    batch, length, channels = u.shape
    with no_autocast(u):
        decay, angle, c_re, c_im = discretise(parameters, wide_dtype(u))
        steps = torch.arange(min(chunk_size, length) + 1, device=u.device)
        powers = torch.stack(mode_powers(decay, angle, steps), -1)  # (D, C + 1, N, 2)
        modes = decay.shape[1]
        s = powers.new_zeros(channels, batch, modes, 2)
        if state is not None:
            s = state.to(s.dtype).transpose(-1, -2).transpose(0, 1).contiguous()
        after = []
        # The first chunk is whatever the block's present chunk still lacks.
        for start, stop, size in query_runs(length, offset % chunk_size, chunk_size):
            x = u[:, start:stop].permute(2, 0, 1).reshape(channels, -1, size)
            # Token j of a chunk has decayed size - 1 - j times at its end.
            carry_in = powers[:, :size].flip(1).flatten(2)
            local = torch.bmm(x, carry_in.to(x.dtype)).to(s.dtype)
            local = local.view(channels, batch, -1, modes, 2)
            keep = kept_states(resets, edges, start, stop, size)
            before, s = chunk_scan(local, powers[:, size], s, keep)
            z_re, z_im = powers[:, size, None, None].unbind(-1)
            re, im = before.unbind(-1)
            carried = torch.stack([z_re * re - z_im * im, z_re * im + z_im * re], -1)
            after.append(local + carried)
        first = (block_size - 1 - offset) // chunk_size  # the chunk with which a block ends
        count = (offset + length) // block_size
        ends = torch.cat(after, 2)[:, :, first :: block_size // chunk_size][:, :, :count]
        read = torch.stack([2 * c_re, -2 * c_im], -1).flatten(2)  # (F, D, 2N)
        y = torch.bmm(ends.reshape(channels, batch * count, 2 * modes), read.permute(1, 2, 0))
        y = y.view(channels, batch, count, len(read)).permute(1, 2, 3, 0)
        u_end = u[:, block_size - offset - 1 :: block_size].to(y.dtype).unsqueeze(2)
        y = y + parameters.D.to(y.dtype) * u_end
    return y.to(u.dtype), s.transpose(0, 1).transpose(-1, -2)


def lti_block_ends_naive(
    u: Tensor,
    parameters: SSMParameters,
    state: Tensor | None = None,
    *,
    block_size: int,
    offset: int = 0,
    resets: Tensor | None = None,
    edges: range = range(0),
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The recurrence for one read-out after the other, then picked. Same signature."""
    del chunk_size
    outputs, after = [], None
    for c, d in zip(parameters.C, parameters.D, strict=True):
        one = parameters._replace(C=c, D=d)
        y, after = lti_ssm_naive(u, one, state, resets=resets, edges=edges)
        outputs.append(y[:, block_size - offset - 1 :: block_size])
    assert after is not None
    return torch.stack(outputs, 2), after
