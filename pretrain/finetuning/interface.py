"""What fine-tuning and generation ask of a model: a language model with a prompt, an
encoder-decoder or a classifier behind one interface.

Shapes: B examples, V vocabulary. Token sequences are (n,) int arrays without BOS and EOS; how they
are joined, closed and padded is the model's own affair.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn


class Pairs(NamedTuple):
    """Inputs and targets, one of each per example."""

    inputs: list[np.ndarray]
    targets: list[np.ndarray]

    def take(self, rows: Sequence[int] | np.ndarray) -> "Pairs":
        """The examples of these rows."""
        return Pairs([self.inputs[i] for i in rows], [self.targets[i] for i in rows])

    def lengths(self) -> np.ndarray:
        """(n,) tokens of input and target together."""
        both = zip(self.inputs, self.targets, strict=True)
        return np.array([len(one) + len(other) for one, other in both], np.int64)


class PairLoss(NamedTuple):
    """What a batch costs.

    Attributes:
        loss_sum: scalar, fp32: nats over all of `TrainableModel.n_targets`.
        n_tokens: what the model read, without pads.
        aux: as in `ModelOutput`.
    """

    loss_sum: Tensor
    n_tokens: int
    aux: dict[str, Tensor]


class TrainableModel(Protocol):
    """A model that learns targets from inputs.

    Attributes:
        module: its parameters and buffers; training and evaluation mode are set on it.
        device: where it is.
    """

    device: torch.device

    @property
    def module(self) -> nn.Module: ...

    def longest_input(self, target_tokens: int) -> int:
        """Most input tokens beside a target of so many (EOS not counted); 0: any number.

        Raises:
            ValueError: none fits beside it.
        """
        ...

    def n_targets(self, batch: Pairs) -> int:
        """How many predictions the loss of these is a sum of: of a text its tokens and EOS."""
        ...

    def loss(self, batch: Pairs) -> PairLoss:
        """The loss of the targets, with gradient."""
        ...

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        """Takes summed `aux` statistics; once per optimizer step."""
        ...


class PairModel(TrainableModel, Protocol):
    """One that writes its targets.

    Attributes:
        vocab_size: V.
        first_token: what `step` is given first.
        one_length: `start` takes inputs of one length only.
    """

    vocab_size: int
    first_token: int
    one_length: bool

    def start(self, inputs: list[np.ndarray]) -> Any:
        """Reads inputs; the state to write from, lanes in their order."""
        ...

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Writes one token per lane.

        Args:
            tokens: (B,) int64, the token before; `first_token` at first.
            state: of `start` or of the step before.

        Returns:
            (B, V) fp32 logits of the token that comes next, and the state after.
        """
        ...

    def select(self, state: Any, lanes: Tensor) -> Any:
        """The state with these lanes, (n,) int64; a lane may come several times, or never."""
        ...
