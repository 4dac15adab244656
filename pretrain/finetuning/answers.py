"""What a model answers to inputs, which are dealt out to the ranks."""

from collections.abc import Sequence

import numpy as np

from pretrain.finetuning.classifier import LabelClassifier
from pretrain.finetuning.generation import GenerationOptions, batches, generate
from pretrain.finetuning.interface import PairModel
from pretrain.finetuning.ranks import Ranks


def write(
    model: PairModel, inputs: Sequence[np.ndarray], options: GenerationOptions, ranks: Ranks
) -> list[np.ndarray]:
    """`generate` by all ranks; the texts in every rank."""
    groups = [[row] for row in range(len(inputs))]
    if model.one_length:  # what can be written side by side stays together
        share = -(-len(inputs) // ranks.size)
        groups = batches(inputs, min(share, options.lanes // options.beams), one_length=True)
    return ranks.map(
        lambda rows: generate(model, [inputs[row] for row in rows], options),
        groups,
        [len(one) for one in inputs],
    )


def classify(
    model: LabelClassifier, inputs: Sequence[np.ndarray], tokens: int, ranks: Ranks
) -> list[int]:
    """`LabelClassifier.classify` by all ranks; the numbers of the labels in every rank."""
    return ranks.map(
        lambda rows: model.classify([inputs[row] for row in rows], tokens),
        [[row] for row in range(len(inputs))],
        [len(one) for one in inputs],
    )
