"""A model that names one of a task's labels by a linear layer, where others write its text.

    encoder-decoder   the mean of the encoder's output over  input EOS,  as Sentence-T5 has it where
                      the decoder takes no part (Ni et al. 2021, 2108.08877)
    language model    the last position of  START input EOS,  which alone has seen everything and is
                      where it would begin to write (Radford et al. 2018)

Pads stand at the end and change nothing. Targets of `Pairs` are the number of the label, (1,).

Shapes: B examples, T tokens, D model width, C labels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.tokenizer import EOS_ID
from pretrain.finetuning.interface import PairLoss, Pairs
from pretrain.finetuning.order import micro_batches
from pretrain.finetuning.padding import padded, room_for_input, to_device
from pretrain.models import EncoderDecoder, LanguageModel
from pretrain.models.layers import init_weights
from pretrain.models.pooling import mean_over_tokens


class LabelClassifier(ABC):
    """What both kinds have in common: a `TrainableModel`.

    Args:
        model: on its device. Parameters of it that nothing reads are frozen.
        n_classes: C.
        autocast: matmuls in bfloat16; the head's is in fp32.
    """

    def __init__(
        self, model: EncoderDecoder | LanguageModel, n_classes: int, *, autocast: bool = False
    ) -> None:
        self.model = model
        self.device = model.embedding.weight.device
        self.n_classes = n_classes
        self.autocast = autocast
        self.head = nn.Linear(model.config.d_model, n_classes)
        init_weights(self.head, model.config.init_std, 1)
        self.module = nn.ModuleDict({"model": model, "head": self.head.to(self.device)})
        if not model.config.tie_embeddings:  # a tied one is the embedding
            model.head.requires_grad_(False)

    @abstractmethod
    def longest_input(self, target_tokens: int = 0) -> int:
        """Most input tokens; 0: any number.

        Raises:
            ValueError: not one.
        """

    @abstractmethod
    def _framed(self, one: np.ndarray) -> np.ndarray:
        """An input as it is read."""

    @abstractmethod
    def _pooled(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens (B, T), mask (B, T) bool, where no pad is -> (B, D) and what the mixers report."""

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        self.model.update_buffers(statistics)

    def n_targets(self, batch: Pairs) -> int:
        return len(batch.targets)

    def loss(self, batch: Pairs) -> PairLoss:
        logits, aux, n_tokens = self._read(batch.inputs)
        labels = to_device(torch.from_numpy(np.concatenate(batch.targets)), self.device)
        return PairLoss(F.cross_entropy(logits, labels, reduction="sum"), n_tokens, aux)

    @torch.inference_mode()
    def classify(self, inputs: Sequence[np.ndarray], tokens: int) -> list[int]:
        """The likeliest label of each input.

        Args:
            inputs: to be read.
            tokens: that are read at one time, pads counted.
        """
        self.module.eval()
        classes = np.zeros(len(inputs), np.int64)
        for rows in micro_batches(np.array([len(self._framed(one)) for one in inputs]), tokens):
            logits, _, _ = self._read([inputs[row] for row in rows])
            classes[rows] = logits.argmax(-1).cpu().numpy()
        return classes.tolist()

    def _read(self, inputs: Sequence[np.ndarray]) -> tuple[Tensor, dict[str, Tensor], int]:
        """(B, C) fp32 logits, what the mixers report, and the tokens read, without pads."""
        tokens, mask = padded([self._framed(one) for one in inputs])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            pooled, aux = self._pooled(to_device(tokens, self.device), to_device(mask, self.device))
        return self.head(pooled.float()), aux, int(mask.sum())


class EncoderClassifier(LabelClassifier):
    """The encoder of an encoder-decoder, its output's mean, and a head."""

    model: EncoderDecoder

    def __init__(self, model: EncoderDecoder, n_classes: int, *, autocast: bool = False) -> None:
        super().__init__(model, n_classes, autocast=autocast)
        model.decoder_blocks.requires_grad_(False)
        model.norm.requires_grad_(False)

    def longest_input(self, target_tokens: int = 0) -> int:
        return 0

    def _framed(self, one: np.ndarray) -> np.ndarray:
        return np.append(one, EOS_ID)

    def _pooled(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, aux = self.model.encode(tokens, mask)
        return mean_over_tokens(hidden, ~mask), aux


class LastTokenClassifier(LabelClassifier):
    """A language model, the last token's hidden state, and a head.

    Args:
        model: on its device.
        n_classes: C.
        start_id: START.
        autocast: matmuls in bfloat16.
    """

    model: LanguageModel

    def __init__(
        self, model: LanguageModel, n_classes: int, start_id: int, *, autocast: bool = False
    ) -> None:
        super().__init__(model, n_classes, autocast=autocast)
        self.start_id = start_id

    def longest_input(self, target_tokens: int = 0) -> int:
        limit = self.model.longest_segment
        return room_for_input(limit) if limit else 0

    def _framed(self, one: np.ndarray) -> np.ndarray:
        return np.concatenate([[self.start_id], one, [EOS_ID]])

    def _pooled(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # What mixers learn beside the loss is of all tokens but pads.
        output = self.model(tokens, loss_mask=mask)
        lanes = torch.arange(len(tokens), device=tokens.device)
        return output.hidden[lanes, mask.sum(1) - 1], output.aux
