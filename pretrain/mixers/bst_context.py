"""Context states of the Block-State Transformer: where they come from and who reads them.

The equations are in pretrain/mixers/bst.py. Shapes: B batch, T time, D model width, H heads, K head
width, W block size, N SSM modes, S filters per channel, E block ends inside the call.

The two classes hide how different the variants are in kind: SH and MH keep every output of the
present block and nothing of the one before, MF keeps S vectors of the one before and nothing else.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.mixers.attention import qk_scale
from pretrain.mixers.base import Clock
from pretrain.mixers.s4d import DiagonalSSM
from pretrain.mixers.unstructured_filters import UnstructuredFilters
from pretrain.ops.lti_block_ends import lti_block_ends
from pretrain.ops.lti_ssm import SSMParameters
from pretrain.ops.normalization import prepare_heads
from pretrain.ops.qkv_heads import last_tokens
from pretrain.ops.state_attention import state_attention
from pretrain.ops.window_attention import window_attention

Filters = DiagonalSSM | UnstructuredFilters


class BSTState(NamedTuple):
    """SH and MH with r tokens of the present block seen: k, v (B, r or W + r, H, K), as projected;
    context_k, context_v (B, r, H, K); ssm (B, D or H D, 2, N). Bounded, and shortest at block
    edges."""

    position: Tensor
    phase: Tensor
    k: Tensor
    v: Tensor
    context_k: Tensor
    context_v: Tensor
    ssm: Tensor


class MultiFilterState(NamedTuple):
    """MF: k, v like `BSTState`; context (B, S, D), what this block reads; ssm (B, D, 2, N)."""

    position: Tensor
    phase: Tensor
    k: Tensor
    v: Tensor
    context: Tensor
    ssm: Tensor


class BlockEndSSM(DiagonalSSM):
    """F read-outs per channel of one diagonal system, at the last token of each block only.

    Args:
        d_model: channels.
        n_filters: F.
        block_size: tokens per block.
        **options: of `DiagonalSSM`.
    """

    def __init__(self, d_model: int, *, n_filters: int, block_size: int, **options: Any) -> None:
        super().__init__(d_model, **options)
        self.n_filters, self.block_size = n_filters, block_size
        self.C = nn.Parameter(torch.randn(n_filters, *self.C.shape) * math.sqrt(0.5))
        self.D = nn.Parameter(torch.randn(n_filters, d_model))

    def filter(
        self,
        u: Tensor,
        output: Tensor,
        skip: Tensor,
        state: Tensor | None,
        resets: Tensor | None,
        edges: range,
    ) -> tuple[Tensor, Tensor]:
        """u (B, T, D) -> (B, E, F, D), E block ends, and the state after the last token."""
        return lti_block_ends(
            u,
            SSMParameters(self.log_dt, self.log_A_real, self.A_imag, output, skip),
            state,
            block_size=self.block_size,
            offset=-edges.start % self.block_size,
            resets=resets,
            edges=edges,
            chunk_size=self.chunk_size,
        )

    def flops_per_token(self) -> float:
        return 4 * self.d_model * self.n_modes * (1 + self.n_filters / self.block_size)

    def executed_flops(self, length: int) -> float:
        ends = length // self.block_size
        return 4 * self.d_model * self.n_modes * (length + self.n_filters * ends)


class HeadwiseLinear(nn.Linear):
    """Keys and values of head h from bank h alone: the weight of a dense lift, read by heads."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__(d_model, 2 * d_model, bias=False)
        self.n_heads = n_heads

    def forward(self, s: Tensor) -> Tensor:
        """s (B, T, H D) -> (B, T, 2 D)."""
        weight = self.weight.unflatten(0, (2, self.n_heads, -1))
        s = s.unflatten(-1, (self.n_heads, -1))
        return torch.einsum("bthd,phkd->btphk", s, weight).flatten(2)


class SameBlockContext(nn.Module):
    """SH and MH: a token reads the outputs of its own block, up to its own.

    Args:
        d_model: model width.
        n_heads: heads.
        filters: from (B, T, banks * D) to the like.
        n_banks: 1 (SH) or one per head (MH).
        block_size: W.
    """

    def __init__(
        self, d_model: int, n_heads: int, filters: Filters, *, n_banks: int, block_size: int
    ) -> None:
        super().__init__()
        self.d_model, self.n_heads, self.n_banks = d_model, n_heads, n_banks
        self.block_size = block_size
        self.filters = filters
        self.kv_proj = (
            nn.Linear(d_model, 2 * d_model, bias=False)
            if n_banks == 1
            else HeadwiseLinear(d_model, n_heads)
        )
        self.scale = qk_scale(n_heads, d_model // n_heads)

    def forward(
        self, q: Tensor, x: Tensor, clock: Clock, state: BSTState | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Queries q (B, T, H, K) and inputs x (B, T, D) -> what is read, like q, and the tail of
        the state."""
        u = x if self.n_banks == 1 else x.repeat(1, 1, self.n_banks)
        s, ssm = self.filters(u, None if state is None else state.ssm, clock.resets, clock.edges)
        k, v = self.kv_proj(s).unflatten(-1, (2, self.n_heads, -1)).unbind(2)
        if state is not None:
            k = torch.cat([state.context_k.to(k.dtype), k], 1)
            v = torch.cat([state.context_v.to(v.dtype), v], 1)
        y = window_attention(
            prepare_heads(q, normalize=True, scale=self.scale),
            prepare_heads(k, normalize=True),
            v,
            block_size=self.block_size,
            reach="own",
            offset=clock.phase % self.block_size,
            scale=1.0,
        )
        keep = (clock.phase + clock.length) % self.block_size
        return y, (last_tokens(k, keep), last_tokens(v, keep), ssm)

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        shape = (batch_size, 0, self.n_heads, self.d_model // self.n_heads)
        empty = torch.zeros(shape, device=device, dtype=dtype)
        assert isinstance(self.filters, DiagonalSSM)
        ssm = self.filters.init_state(batch_size, device=device, dtype=dtype)
        return empty, empty, ssm

    def flops_per_token(self, context: int) -> float:
        visible = (min(self.block_size, context) + 1) / 2  # whole blocks are assumed
        return 4 * self.d_model**2 + 4 * self.d_model * visible

    def executed_flops(self, length: int) -> float:
        tail = length % self.block_size
        scores = (length - tail) * self.block_size + tail**2
        return 4 * length * self.d_model**2 + 4 * self.d_model * scores

    def undecayed(self) -> set[str]:
        return set()


class PreviousBlockContext(nn.Module):
    """MF: a token reads each filter's last output of the previous block.

    Args:
        d_model: model width.
        n_heads: heads.
        filters: from (B, T, D) to (B, E, S, D), outputs at block ends.
        n_filters: S.
        block_size: W.
    """

    def __init__(
        self, d_model: int, n_heads: int, filters: Filters, *, n_filters: int, block_size: int
    ) -> None:
        super().__init__()
        self.d_model, self.n_heads, self.n_filters = d_model, n_heads, n_filters
        self.block_size = block_size
        self.filters = filters
        self.kv_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.scale = qk_scale(n_heads, d_model // n_heads)
        # Without ids the states are a set, and which filter spoke is lost. The scales are those of
        # the Block-Recurrent Transformer's states.
        self.ids = nn.Parameter(torch.randn(n_filters, d_model))
        self.initial = nn.Parameter(0.1 * torch.randn(n_filters, d_model))

    def forward(
        self, q: Tensor, x: Tensor, clock: Clock, state: MultiFilterState | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `SameBlockContext.forward`."""
        ends, ssm = self.filters(x, None if state is None else state.ssm, clock.resets, clock.edges)
        initial = self.initial.to(ends.dtype).expand(x.shape[0], 1, -1, -1)
        first = initial if state is None else state.context.to(ends.dtype).unsqueeze(1)
        context = torch.cat([first, ends], 1)  # of every block, and of the next one at its edge
        fresh = clock.fresh_blocks(self.block_size)
        if fresh is not None:
            known = fresh.shape[1]
            begun = torch.where(fresh[:, :, None, None], initial, context[:, :known])
            context = torch.cat([begun, context[:, known:]], 1)
        offset = clock.phase % self.block_size
        blocks = -(-(offset + clock.length) // self.block_size)
        kv = self.kv_proj(context[:, :blocks] + self.ids.to(context.dtype))
        k, v = kv.unflatten(-1, (2, self.n_heads, -1)).unbind(3)
        y = state_attention(
            prepare_heads(q, normalize=True, scale=self.scale),
            prepare_heads(k.flatten(1, 2), normalize=True).view_as(k),
            v,
            block_size=self.block_size,
            offset=offset,
            scale=1.0,
        )
        return y, (context[:, -1].clone(), ssm)

    def init_state(
        self, batch_size: int, *, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        # Zeros do: the first block of a document reads the learned context wherever it begins.
        context = torch.zeros(batch_size, self.n_filters, self.d_model, device=device, dtype=dtype)
        assert isinstance(self.filters, DiagonalSSM)
        ssm = self.filters.init_state(batch_size, device=device, dtype=dtype)
        return context, ssm

    def flops_per_token(self, context: int) -> float:
        del context
        lift = 4 * self.d_model**2 * self.n_filters / self.block_size
        return lift + 4 * self.d_model * self.n_filters

    def executed_flops(self, length: int) -> float:
        lift = -(-length // self.block_size) * self.n_filters * 4 * self.d_model**2
        return lift + 4 * self.d_model * self.n_filters * length

    def undecayed(self) -> set[str]:
        return {"ids", "initial"}
