"""The small evaluation during training of encoder-decoders: the loss on texts damaged once for all.

The rows are the same every time, and dealt out to the ranks. Every rank makes the same number of
forwards, dummies included: under ZeRO-3 each forward gathers parameters, and a rank with fewer
would leave the others waiting.
"""

import torch
from torch import Tensor, nn

from pretrain.batch import EncoderDecoderBatch
from pretrain.mixers.base import index_state, map_state
from pretrain.training.engine import World
from pretrain.training.metrics import means_over_ranks


class DenoisingValidation:
    """Callable `evaluate(model)` of the trainer.

    Args:
        rows: all that is asked, on the CPU.
        micro_batch_size: rows per forward.
        world: the rows are dealt out to the ranks in turn.
    """

    def __init__(self, rows: EncoderDecoderBatch, micro_batch_size: int, world: World) -> None:
        n_rows, unit = len(rows.loss_mask), micro_batch_size * world.size
        self.device = world.device
        self.micro_batches: list[EncoderDecoderBatch] = []
        numbers = torch.arange(-(-n_rows // unit) * unit)[world.rank :: world.size]
        for number in numbers.split(micro_batch_size):
            is_real = number < n_rows
            batch: EncoderDecoderBatch = index_state(rows, torch.where(is_real, number, 0))
            batch = batch._replace(loss_mask=batch.loss_mask & is_real[:, None])
            self.micro_batches.append(map_state(lambda part: part.to(world.device), batch))

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Over all targets, and over each of their groups: nats per target."""
        totals: dict[str, Tensor] = {}
        for batch in self.micro_batches:
            nll = model(**batch.model_inputs()).nll.double()
            groups = {f"val/loss/{name}": group for name, group in batch.target_groups().items()}
            for name, counted in {"val/loss": batch.loss_mask, **groups}.items():
                found = torch.stack([(nll * counted).sum(), counted.sum().double()])
                totals[name] = totals.get(name, 0) + found
        return means_over_ranks(totals)
