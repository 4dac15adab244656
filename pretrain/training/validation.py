"""The small evaluation during training: mean loss over a few documents, streamed with their state.

It answers "is it still learning?"; numbers to publish come from `evals`, with intervals. Every rank
makes the same number of forwards, dummies included: under ZeRO-3 each forward gathers parameters,
and a rank with fewer would leave the others waiting.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training.engine import World
from pretrain.training.metrics import bits_per_byte


class Validation:
    """Callable `evaluate(model)` of the trainer.

    Args:
        documents: (length + 1,) int64 each, all of one length, beginning with BOS.
        segment: tokens per forward, a multiple of the model's reset grid.
        bytes_per_token: of the validation text.
        world: the documents are dealt out to the ranks in turn.
    """

    def __init__(
        self, documents: Sequence[Tensor], segment: int, bytes_per_token: float, world: World
    ) -> None:
        lanes = -(-len(documents) // world.size)
        mine = list(documents[world.rank :: world.size])
        self.real = torch.arange(lanes, device=world.device) < len(mine)
        mine += [documents[0]] * (lanes - len(mine))
        self.tokens = torch.stack(mine).to(world.device)
        self.segment, self.bytes_per_token, self.device = segment, bytes_per_token, world.device

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Mean loss (nats per token) and bits per byte over all documents."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        state = None
        for start in range(0, self.tokens.shape[1] - 1, self.segment):
            piece = self.tokens[:, start : start + self.segment + 1]
            mask = self.real[:, None].expand(-1, piece.shape[1] - 1)
            output = model(piece[:, :-1], state, targets=piece[:, 1:], loss_mask=mask)
            state = output.state
            total += torch.stack([output.loss_sum.double(), mask.sum().double()])
        dist.all_reduce(total)
        nll, count = total.tolist()
        loss = nll / count
        return {
            "validation/loss": loss,
            "validation/bits_per_byte": bits_per_byte(loss, self.bytes_per_token),
        }
