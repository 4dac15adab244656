"""Validation of encoder-decoders: ranks with any number of rows ask the same questions as one.

Shapes: N rows, T targets.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.batch import EncoderDecoderBatch
from pretrain.training import metrics
from pretrain.training.denoising_validation import DenoisingValidation
from pretrain.training.engine import World

N, T = 7, 3


def rows_of() -> EncoderDecoderBatch:
    """Row n asks for n, and its first target is a sentinel; odd rows have one target less."""
    tokens = torch.arange(N)[:, None].expand(N, T + 1)
    loss_mask = torch.ones(N, T, dtype=torch.bool)
    loss_mask[1::2, -1] = False
    sentinel_mask = torch.arange(T).expand(N, T) == 0
    return EncoderDecoderBatch(tokens, tokens >= 0, tokens, loss_mask, sentinel_mask)


class Model(nn.Module):
    """Its loss is the target, ten times that on sentinels; it counts its forwards."""

    calls = 0

    def forward(self, *, targets: Tensor, loss_mask: Tensor, **_: Any) -> Any:
        self.calls += 1
        weights = torch.tensor([10.0, 1.0, 1.0])
        return SimpleNamespace(nll=targets * weights * loss_mask)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 7), (1, 2), (3, 2), (4, 3)])
def test_all_ranks_together_ask_every_row_once_in_equally_many_forwards(
    world_size: int, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[Tensor] = []
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda x: sums.append(x.clone()))
    totals, calls = torch.zeros(3, 2, dtype=torch.float64), set()
    for rank in range(world_size):
        model = Model()
        world = World(rank, world_size, torch.device("cpu"))
        names = list(DenoisingValidation(rows_of(), micro_batch_size, world)(model))
        totals += torch.stack(sums)
        calls.add(model.calls)
        sums.clear()
    assert len(calls) == 1
    found = dict(zip(names, totals.tolist(), strict=True))
    sentinel, other = 10 * 21.0, 21.0 + (0 + 2 + 4 + 6)
    assert found == {
        "val/loss": [sentinel + other, 7 + 11],
        "val/loss/sentinel": [sentinel, 7],
        "val/loss/other": [other, 11],
    }
