"""The token-mixer contract: Y = P(X), mix along the sequence; channel mixing is the MLP's work.

Shapes: B batch, T time, D model width, n reset-grid edges inside a call.

A call with T tokens equals any split of it with the state handed on. The surprising part is the
*phase*, position modulo the reset grid: it decides shapes (where blocks end inside a call), so it
has to be a Python integer, without a host synchronisation and without a graph break. A state
therefore carries it as the length of an empty tensor, `phase` (B, r, 0).
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixerState(Protocol):
    """What every mixer's state NamedTuple has. All tensors batch first: index by lane, concatenate,
    detach and save with `map_state`, `cat_states`, `index_state`."""

    @property
    def position(self) -> Tensor:
        """(B,) int64: tokens since the last reset; equal modulo the reset grid across the batch."""
        ...

    @property
    def phase(self) -> Tensor:
        """(B, r, 0): r tokens since the last grid edge, the static twin of `position`."""
        ...


class MixerOutput(NamedTuple):
    """A NamedTuple, because ZeRO-3's hooks see through those.

    Attributes:
        y: (B, T, D) what the block adds to the residual stream.
        state: the state after the last token.
        aux: names ending in `_loss` are losses summed over tokens; all others are statistics that
            the trainer sums over micro-batches and ranks and hands to `update_buffers`.
        gate: (B, T, D) for mixers with a gated residual x + gate * (y - x), else None.
    """

    y: Tensor
    state: Any
    aux: dict[str, Tensor]
    gate: Tensor | None = None


class Clock(NamedTuple):
    """Where a call stands on the reset grid; everything static is a Python integer.

    Attributes:
        length: T, tokens of this call.
        phase: tokens since the last grid edge before the call.
        edges: offsets of the grid edges inside the call, in tokens.
        position: (B,) int64, tokens since the last reset before the call; None: the call begins
            a document, known without looking at any data.
        resets: (B, len(edges)) bool, or None.
    """

    length: int
    phase: int
    edges: range
    position: Tensor | None
    resets: Tensor | None

    def after(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`position` and `phase` of the state after the call; `x` (B, T, D) lends its batch."""
        batch, grid = x.shape[0], self.edges.step
        position = self.length + (
            x.new_zeros(batch, dtype=torch.int64) if self.position is None else self.position
        )
        if self.resets is not None:
            offsets = torch.arange(self.edges.start, self.edges.stop, grid, device=x.device)
            last = torch.where(self.resets, offsets, -1).amax(1)
            position = torch.where(last >= 0, self.length - last, position)
        return position, x.new_empty(batch, (self.phase + self.length) % grid, 0)

    def fresh_blocks(self, block_size: int) -> Tensor | None:
        """Which of the blocks this call touches begin a document.

        Returns:
            (B, blocks) bool; (B, 1), for the first block alone, when there are no resets; None when
            there is no state either, so that the first block begins a document and no other does.
        """
        if self.position is None and self.resets is None:
            return None
        offset = self.phase % block_size
        if self.position is None:
            assert self.resets is not None
            first = torch.ones_like(self.resets[:, 0])
        else:
            # Resets lie on block starts, so `position` counts whole blocks plus the offset.
            first = self.position <= offset
        if self.resets is None:
            return first.unsqueeze(1)
        blocks = -(-(offset + self.length) // block_size)
        fresh = F.pad(first.unsqueeze(1), (0, blocks - 1))
        start, step = (offset + self.edges.start) // block_size, self.edges.step // block_size
        fresh[:, start::step] |= self.resets
        return fresh


class TokenMixer(nn.Module):
    """Mixes information along the sequence. Never detaches; forward mutates nothing.

    The projection that writes to the residual stream is a Linear called `out_proj`: the model
    scales its initialisation by depth.

    Attributes:
        block_size: the mixer's own grid: resets may only fall on its multiples (1: anywhere).
        reset_grid: the model's grid, the least common multiple over its layers, set by the model.
        constant_state: False when the state grows with the context (full attention's cache), or
            when there is none to carry.
        longest_segment: 0, or tokens: a mixer without a recurrence, which knows no lag beyond them
            and takes neither a carried state nor resets.
        two_sided: True when the constructor takes `causal=False`.
        encoder_only: True when it takes nothing else.
        causal: False in an encoder. Such a mixer reads whole sequences, one per lane: it takes no
            state and no resets, returns no state, and its forward has `padding`, (B, T) bool, True
            where a lane has no token; what it makes there means nothing.
        takes_counted: True when forward also takes `counted` (B, T) bool, the tokens that the loss
            counts, because what it learns beside the loss has to leave out the same ones (pads).
    """

    block_size: int = 1
    reset_grid: int = 1
    constant_state: bool = True
    longest_segment: int = 0
    two_sided: ClassVar[bool] = False
    takes_counted: ClassVar[bool] = False
    encoder_only: ClassVar[bool] = False
    causal: bool = True

    def check_sides(self, state: Any, resets: Tensor | None, padding: Tensor | None) -> None:
        """Refuses what only the other kind of use has a meaning for.

        Raises:
            ValueError: state or resets in an encoder, padding in a decoder.
        """
        if not self.causal and (state is not None or resets is not None):
            raise ValueError(
                "causal=False reads whole sequences, one per lane: it has no state to carry and "
                "no documents to separate, call it without state and resets"
            )
        if self.causal and padding is not None:
            raise ValueError(
                "padding is for causal=False: in causal use pads stand behind the tokens, which "
                "never see them; call without padding"
            )

    def clock(self, x: Tensor, state: Any, resets: Tensor | None) -> Clock:
        """Reads the state's place on the grid and checks `resets` against it.

        Raises:
            ValueError: not one flag per grid edge inside the call.
        """
        length, grid = x.shape[1], self.reset_grid
        phase = 0 if state is None else state.phase.shape[1]
        edges = range(-phase % grid, max(length, -phase % grid), grid)
        if resets is not None and resets.shape[1] != len(edges):
            raise ValueError(
                f"resets has {resets.shape[1]} flags per lane, but {length} tokens from phase "
                f"{phase} hold {len(edges)} edges of the reset grid of {grid} tokens"
            )
        if not edges:
            resets = None
        return Clock(length, phase, edges, None if state is None else state.position, resets)

    def forward(self, x: Tensor, state: Any = None, *, resets: Tensor | None = None) -> MixerOutput:
        """Mixes x (B, T, D), already normed by the block, continuing from `state`.

        Args:
            x: (B, T, D).
            state: what the previous call returned; None at the start of a document.
            resets: (B, n) bool, one flag per grid edge inside this call; None when there are none.
        """
        raise TypeError(f"{type(self).__name__} does not define forward")

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        """The state before the first token. On the grid later ones have its sizes, but for those
        that are 0 here and grow, as full attention's cache does."""
        raise TypeError(f"{type(self).__name__} does not define init_state")

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs per token in documents of `context` tokens, projections included."""
        raise TypeError(f"{type(self).__name__} does not define flops_per_token")

    def executed_flops(self, length: int) -> float:
        """Forward FLOPs of matmuls that the plain form runs for one sequence of `length` tokens
        from the start of a document: the convention's and the masked share."""
        raise TypeError(f"{type(self).__name__} does not define executed_flops")

    def no_decay_parameters(self) -> set[str]:
        """Own parameter names without weight decay beyond the rule (vectors never decay)."""
        return set()

    def ssm_parameters(self) -> set[str]:
        """Own parameter names that train at the state-space learning rate."""
        return set()

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        """Called once after each optimizer step with this mixer's summed `aux` statistics."""

    def health(self) -> dict[str, Tensor]:
        """What the parameters say about long memory; reads them whole, writes nothing.

        Returns:
            Of these what the mixer has, without gradient, fp64:
            dt: step sizes in tokens, one per channel, head or mode; where they depend on the input,
                those of an input that adds nothing to them.
            memory_horizon: tokens until what a mode holds has decayed to 1/e, -1 / log|q| for a
                mode that a token multiplies by q; one per mode, any shape. Elementary: |q|^t = 1/e.
            code_perplexity: codes in use, exp of the entropy of their use; a scalar.
            dead_codes: codes that hardly anything falls on; a scalar.
        """
        return {}


def map_state(fn: Any, state: Any) -> Any:
    """Applies `fn` to every tensor of a nested NamedTuple/tuple state; None stays None."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return fn(state)
    mapped = [map_state(fn, part) for part in state]
    return type(state)(*mapped) if hasattr(state, "_fields") else type(state)(mapped)


def index_state(state: Any, lanes: Any) -> Any:
    """Selects lanes (a slice or an index tensor) along the batch axis."""
    return map_state(lambda t: t[lanes], state)


def cat_states(states: list[Any]) -> Any:
    """Concatenates states of equal structure along the batch axis."""
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(states)
    parts = [cat_states(list(column)) for column in zip(*states, strict=True)]
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
