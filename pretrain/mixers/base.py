"""The token-mixer contract: Y = P(X), mix along the sequence; channel mixing is the MLP's work.

Shapes: B batch, T time, D model width, n reset-grid edges inside a call.

A call with T tokens equals any split of it with the state handed on. The surprising part is the
*phase*, position modulo the reset grid: it decides shapes (where blocks end inside a call), so it
has to be a Python integer, without a host synchronisation and without a graph break. A state
therefore carries it as the length of an empty tensor, `phase` (B, r, 0).
"""

from typing import Any, NamedTuple, Protocol

import torch
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


class TokenMixer(nn.Module):
    """Mixes information along the sequence. Never detaches; forward mutates nothing.

    Attributes:
        block_size: the mixer's own grid: resets may only fall on its multiples (1: anywhere).
        reset_grid: the model's grid, the least common multiple over its layers, set by the model.
    """

    block_size: int = 1
    reset_grid: int = 1

    def forward(self, x: Tensor, state: Any = None, *, resets: Tensor | None = None) -> MixerOutput:
        """Mixes x (B, T, D), already normed by the block, continuing from `state`.

        Args:
            x: (B, T, D).
            state: what the previous call returned; None at the start of a document.
            resets: (B, n) bool, one flag per grid edge inside this call; None when there are none.
        """
        raise TypeError(f"{type(self).__name__} does not define forward")

    def init_state(self, batch_size: int, *, device: torch.device, dtype: torch.dtype) -> Any:
        """The state before the first token; constant size, except full attention's cache."""
        raise TypeError(f"{type(self).__name__} does not define init_state")

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs per token at a training length of `context` tokens, projections included."""
        raise TypeError(f"{type(self).__name__} does not define flops_per_token")

    def no_decay_parameters(self) -> set[str]:
        """Own parameter names without weight decay beyond the rule (vectors never decay)."""
        return set()

    def ssm_parameters(self) -> set[str]:
        """Own parameter names that train at the state-space learning rate."""
        return set()

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        """Called once after each optimizer step with this mixer's summed `aux` statistics."""


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
