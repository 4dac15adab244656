"""The small evaluation during training: bits per byte of a few documents, and what context gains.

It answers "is it still learning, and does it use what lies far behind?"; numbers to publish come
from `evals`, with intervals. The documents are the same every time. Each runs by itself, so that
what it adds does not depend on which rank took it or beside what: sums and counts are of doubles,
and any number of ranks finds the same (a mean of the ranks' means would not).

Every rank makes the same number of forwards, dummies included: under ZeRO-3 each forward gathers
parameters, and a rank with fewer would leave the others waiting.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training.engine import World
from pretrain.training.metrics import bits_per_byte


class Validation:
    """Callable `evaluate(model)` of the trainer.

    The gain from context is of the same targets twice: those in the latter halves of segments of
    the documents' latter halves, once with the state carried from the start of the document and
    once with each segment read alone, where they see half a segment to one. Places in a block are
    then the same both times.

    Args:
        documents: (length + 1,) int64 each, all of one length, beginning with BOS.
        segment: tokens per forward, a multiple of the model's reset grid.
        bytes_per_token: of the validation text.
        world: the documents are dealt out to the ranks in turn.

    Attributes:
        gain_context: tokens that every target of the gain has before it, at least; 0 where the
            documents are too short to have such targets.
    """

    def __init__(
        self, documents: Sequence[Tensor], segment: int, bytes_per_token: float, world: World
    ) -> None:
        turns = -(-len(documents) // world.size)
        mine = list(documents[world.rank :: world.size])
        self.real = [True] * len(mine) + [False] * (turns - len(mine))
        mine += [documents[0]] * (turns - len(mine))
        self.tokens = torch.stack(mine).to(world.device)
        self.segment, self.bytes_per_token, self.device = segment, bytes_per_token, world.device
        length = self.tokens.shape[1] - 1
        whole = length // segment
        self.alone = range((whole + 1) // 2 * segment, whole * segment, segment)
        self.gain_context = self.alone.start + segment // 2 if whole > 1 else 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Over all documents: nats per token, bits per byte, nats per token that context gains."""
        total = self.sums(model)
        dist.all_reduce(total)
        nats, tokens, gained, targets = total.tolist()
        values = {
            "val/loss": nats / tokens,
            "val/bpb": bits_per_byte(nats / tokens, self.bytes_per_token),
        }
        if self.gain_context:
            values[f"val/context_gain@{self.gain_context}"] = gained / targets
        return values

    def sums(self, model: nn.Module) -> Tensor:
        """(4,) float64 of this rank's documents: nats, tokens, nats gained, their targets."""
        total = torch.zeros(4, dtype=torch.float64, device=self.device)
        for document, real in zip(self.tokens.split(1), self.real, strict=True):
            found = self._document(model, document)
            if real:
                total += found
        return total

    def _document(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """(4,) as of `sums`, of one document, (1, length + 1)."""
        found = torch.zeros(4, dtype=torch.float64, device=self.device)
        half, state = self.segment // 2, None
        for start in range(0, tokens.shape[1] - 1, self.segment):
            piece = tokens[:, start : start + self.segment + 1]
            nll, state = self._segment(model, piece, state)
            found[0] += nll.sum()
            found[1] += nll.numel()
            if start in self.alone:
                gained = (self._segment(model, piece, None)[0] - nll)[:, half:]
                found[2] += gained.sum()
                found[3] += gained.numel()
        return found

    def _segment(self, model: nn.Module, piece: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Its losses, (1, T) float64, and the state after it."""
        mask = torch.ones_like(piece[:, 1:], dtype=torch.bool)
        output = model(piece[:, :-1], state, targets=piece[:, 1:], loss_mask=mask, per_token=True)
        return output.nll.double(), output.state
