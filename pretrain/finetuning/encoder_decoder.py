"""An encoder-decoder that reads inputs closed by EOS and writes targets behind PAD, as T5 does.

Each decoder layer's keys and values of the input are made once, when it is read; the decoder's own
state does not grow where its mixers' do not. Inputs of a batch may differ in length.

Shapes: B examples, S input tokens, T target tokens, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import EOS_ID, PAD_ID
from pretrain.finetuning.interface import PairLoss, Pairs
from pretrain.finetuning.padding import padded, to_device
from pretrain.mixers.base import index_state
from pretrain.models import DecoderState, EncoderDecoder


class PairEncoderDecoder:
    """An `EncoderDecoder` as a `PairModel`.

    Args:
        model: on its device.
        autocast: matmuls in bfloat16.

    Raises:
        ValueError: a decoder layer carries no state, so that nothing can be written.
    """

    one_length = False
    first_token = PAD_ID

    def __init__(self, model: EncoderDecoder, *, autocast: bool = False) -> None:
        if model.longest_segment:
            raise ValueError(
                f"a decoder layer takes segments of {model.longest_segment} tokens and carries no "
                f"state, without which nothing is written; choose another mixer for the decoder"
            )
        self.module = model
        self.autocast = autocast
        self.device = model.embedding.weight.device
        self.vocab_size = model.config.vocab_size

    def longest_input(self, target_tokens: int) -> int:
        return 0

    def n_targets(self, batch: Pairs) -> int:
        return sum(len(target) + 1 for target in batch.targets)

    def loss(self, batch: Pairs) -> PairLoss:
        inputs, mask = self._closed(batch.inputs)
        targets, counted = self._closed(batch.targets)
        written = torch.cat([torch.full_like(targets[:, :1], PAD_ID), targets[:, :-1]], 1)
        with self._autocast():
            output = self.module(
                self._moved(written),
                encoder_tokens=self._moved(inputs),
                encoder_mask=self._moved(mask),
                targets=self._moved(targets),
                loss_mask=self._moved(counted),
            )
        assert output.loss_sum is not None
        return PairLoss(output.loss_sum, int(mask.sum()) + int(counted.sum()), output.aux)

    def start(self, inputs: list[np.ndarray]) -> DecoderState:
        tokens, mask = self._closed(inputs)
        with self._autocast():
            return self.module.start(self._moved(tokens), self._moved(mask))

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, Any]:
        with self._autocast():
            output = self.module(tokens.unsqueeze(1), state)
            logits = self.module.logits(output.hidden)
        return logits[:, 0].float(), output.state

    def select(self, state: DecoderState, lanes: Tensor) -> DecoderState:
        return index_state(state, lanes)

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        self.module.update_buffers(statistics)

    def _closed(self, rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """(B, S) int64, EOS behind each row and PAD behind that; and (B, S) bool, where no PAD is.
        Both on the CPU."""
        return padded([np.append(row, EOS_ID) for row in rows])

    def _moved(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
