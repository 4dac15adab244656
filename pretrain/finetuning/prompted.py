"""A language model that reads an input as a prompt and writes the target behind it.

    START input EOS target EOS

START is what stood before documents in pretraining, the first EOS separates, and the loss counts
the target and its EOS alone. `step` is given the separator first, so an empty input is no special
case. Pads stand at the end, where a causal model never sees them.

Shapes: B examples, T tokens, D model width, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import EOS_ID
from pretrain.finetuning.interface import PairLoss, Pairs
from pretrain.finetuning.padding import padded, room_for_input, to_device
from pretrain.mixers.base import index_state
from pretrain.models import LanguageModel
from pretrain.ops.cross_entropy import CrossEntropy

PREFILL_TOKENS = 8192


class PromptedLanguageModel:
    """Writes from the carried state, whose size does not grow where the mixers' do not.

    Lanes of a batch have inputs of one length: in a state all lanes have the same phase.

    Args:
        model: on its device.
        start_id: START.
        autocast: matmuls in bfloat16.

    Raises:
        ValueError: a layer of the model carries no state; see `RereadingLanguageModel`.
    """

    one_length = True
    first_token = EOS_ID

    def __init__(self, model: LanguageModel, start_id: int, *, autocast: bool = False) -> None:
        self.module = model
        self.start_id = start_id
        self.autocast = autocast
        self.device = model.embedding.weight.device
        self.vocab_size = model.config.vocab_size
        self._check()

    def _check(self) -> None:
        if limit := self.module.longest_segment:
            raise ValueError(
                f"a layer takes segments of {limit} tokens and carries no state; generate with "
                f"RereadingLanguageModel"
            )

    def longest_input(self, target_tokens: int) -> int:
        limit = self.module.longest_segment
        # Nothing is read behind the target's last token.
        return room_for_input(limit, target_tokens) if limit else 0

    def n_targets(self, batch: Pairs) -> int:
        return sum(len(target) + 1 for target in batch.targets)

    def loss(self, batch: Pairs) -> PairLoss:
        rows = [
            np.concatenate([[self.start_id], one, [EOS_ID], other, [EOS_ID]])
            for one, other in zip(batch.inputs, batch.targets, strict=True)
        ]
        tokens, counted = padded([row[:-1] for row in rows])
        places, targets = [], []
        for lane, (row, target) in enumerate(zip(rows, batch.targets, strict=True)):
            first = len(row) - len(target) - 2  # of the separator
            places.append(lane * tokens.shape[1] + np.arange(first, len(row) - 1))
            targets.append(row[first + 1 :])
        # Found here: a boolean mask on a GPU would make the host wait for it.
        chosen = torch.from_numpy(np.concatenate(places))
        wanted = torch.from_numpy(np.concatenate(targets).astype(np.int64))
        with self._autocast():
            # What mixers learn beside the loss is of all tokens but pads.
            output = self.module(self._moved(tokens), loss_mask=self._moved(counted))
            hidden = output.hidden.flatten(0, 1)[self._moved(chosen)]
            loss = self.module.head(hidden.unsqueeze(0), self._moved(wanted).unsqueeze(0))
        assert isinstance(loss, CrossEntropy)
        return PairLoss(loss.loss_sum, int(counted.sum()), output.aux)

    def start(self, inputs: list[np.ndarray]) -> Any:
        prompt = self._prompt(inputs)
        segment = PREFILL_TOKENS if self.module.constant_state else prompt.shape[1]
        state = None
        with self._autocast():
            for part in prompt.split(segment, 1):  # a book's activations need not fit at once
                state = self.module(part, state).state
        return state

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        with self._autocast():
            output = self.module(tokens.unsqueeze(1), state)
            logits = self.module.logits(output.hidden)
        return logits[:, 0].float(), output.state

    def select(self, state: Any, lanes: Tensor) -> Any:
        return index_state(state, lanes)

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        self.module.update_buffers(statistics)

    def _prompt(self, inputs: list[np.ndarray]) -> Tensor:
        """(B, T) START and the inputs, which are of one length."""
        rows = np.stack([np.concatenate([[self.start_id], one]) for one in inputs])
        return self._moved(torch.from_numpy(rows.astype(np.int64)))

    def _moved(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)


class RereadingLanguageModel(PromptedLanguageModel):
    """The same without a carried state: every step reads the whole text again.

    For models with layers that have none, at a cost that grows with the square of the length; for
    all others it is what the carried state is compared with. The state is the text, (B, T).
    """

    def _check(self) -> None:
        """Every model will do."""

    def start(self, inputs: list[np.ndarray]) -> Tensor:
        return self._prompt(inputs)

    def step(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        text = torch.cat([state, tokens.unsqueeze(1)], 1)
        with self._autocast():
            hidden = self.module(text).hidden[:, -1]
            logits = self.module.logits(hidden)
        return logits.float(), text


def prompted(
    model: LanguageModel, start_id: int, *, autocast: bool = False
) -> PromptedLanguageModel:
    """The form that a model can take: with a carried state if all of its layers have one."""
    kind = RereadingLanguageModel if model.longest_segment else PromptedLanguageModel
    return kind(model, start_id, autocast=autocast)
