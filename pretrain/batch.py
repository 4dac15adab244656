"""The seam between data and training: what one micro-batch is and how a loader is positioned.

Shapes: B lanes (sequences) in a micro-batch, T tokens of a segment (of a target, in encoder-decoder
training, S then being those of its input), n reset-grid edges inside it.
`data` produces these types, `pretrain.training` consumes them; neither imports the other.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch. A segment hands out T + 1 tokens and overlaps its successor by one.

    Attributes:
        tokens: (B, T + 1) int64. `tokens[:, :-1]` is the input, `tokens[:, 1:]` the targets.
        loss_mask: (B, T) bool, True where the target counts.
        resets: (B, n) bool, one flag for every grid edge at offsets 0, G, 2G, ... < T: True where a
            new document begins. None when no model is to stop there: packed windows, lanes that
            cross documents.
        doc_id: (B, T + 1) int64, the document each token comes from; -1 on padding.
    """

    tokens: Tensor
    loss_mask: Tensor
    resets: Tensor | None
    doc_id: Tensor

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of a language model's forward."""
        return {
            "tokens": self.tokens[:, :-1],
            "resets": self.resets,
            "targets": self.tokens[:, 1:],
            "loss_mask": self.loss_mask,
        }

    def target_groups(self) -> dict[str, Tensor]:
        """(B, T) bool by name: targets whose losses are also reported apart."""
        return {}


class EncoderDecoderBatch(NamedTuple):
    """One micro-batch of encoder-decoder training: a damaged text and what is missing from it.

    Attributes:
        encoder_tokens: (B, S) int64, closed by EOS, PAD behind it.
        encoder_mask: (B, S) bool, True where a token stands, False on PAD. None when there is no
            PAD, which attention without a mask is faster for: all but an epoch's last window.
        decoder_tokens: (B, T + 1) int64. `[:, :-1]` is the decoder's input, which starts with PAD
            as T5's does; `[:, 1:]` are the targets, closed by EOS, PAD behind it.
        loss_mask: (B, T) bool, True where the target counts.
        sentinel_mask: (B, T) bool, True where the target is a sentinel: nearly free to predict, so
            a loss says little unless it is split.
    """

    encoder_tokens: Tensor
    encoder_mask: Tensor | None
    decoder_tokens: Tensor
    loss_mask: Tensor
    sentinel_mask: Tensor

    def model_inputs(self) -> dict[str, Any]:
        """Arguments of an encoder-decoder's forward."""
        return {
            "encoder_tokens": self.encoder_tokens,
            "encoder_mask": self.encoder_mask,
            "tokens": self.decoder_tokens[:, :-1],
            "targets": self.decoder_tokens[:, 1:],
            "loss_mask": self.loss_mask,
            "per_token": True,
        }

    def target_groups(self) -> dict[str, Tensor]:
        """(B, T) bool by name: targets whose losses are also reported apart."""
        return {
            "sentinel": self.loss_mask & self.sentinel_mask,
            "other": self.loss_mask & ~self.sentinel_mask,
        }


BatchType = TypeVar("BatchType")


class StepLoader(Protocol[BatchType]):
    """Batches as a pure function of the optimizer step: a position is an integer."""

    def steps(self, start_step: int) -> Iterator[list[BatchType]]:
        """Yields, for each optimizer step from `start_step` on, this rank's micro-batches."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """JSON-able description of the position after `step` steps, equal on every rank.

        Every rank calls it at the same time: a loader may have to ask the others.
        """
        ...

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raises ValueError, naming each difference, when `saved` belongs to another data order.

        Called before `steps`; a loader may take from it what makes going on there cheap.
        """
        ...
