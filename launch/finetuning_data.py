"""What a fine-tuning reads: the examples of a task that are asked for, as tokens."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.tokenizer import Tokenizer
from evals.downstream.examples import Example
from evals.downstream.tasks import Splits, Task
from pretrain.finetuning.classifier import LabelClassifier
from pretrain.finetuning.encode import encode, limits_of
from pretrain.finetuning.interface import Pairs, TrainableModel


def limited(splits: Splits, *, train: int, validation: int, test: int) -> Splits:
    """The examples of lowest rank, where fewer are asked for (0: all); in their order."""

    def some(examples: list[Example], count: int) -> list[Example]:
        if not 0 < count < len(examples):
            return examples
        lowest = sorted(range(len(examples)), key=lambda row: examples[row].rank())[:count]
        return [examples[row] for row in sorted(lowest)]

    return Splits(
        some(splits.train, train),
        some(splits.validation, validation),
        {name: some(part, test) for name, part in splits.tests.items()},
    )


def labels_of(task: Task, splits: Splits) -> list[str]:
    """What a classifier may answer; none for other tasks. White space around a label is none of
    it, here as in the metrics."""
    if task.kind != "classification":
        return []
    given = task.labels.values() or {example.references[0] for example in splits.train}
    labels = [label.strip() for label in given]
    return list(dict.fromkeys(labels if task.labels else sorted(labels)))


@dataclass(frozen=True)
class EncodedTask:
    """The task as tokens.

    Attributes:
        train: pairs of training; for a classifier a target is the number of its label, (1,).
        validation: inputs.
        tests: inputs by name of test.
        target_tokens: of the longest text to write, without EOS; 0: none is written.
        cut: share of the inputs that was truncated, by split.
    """

    train: Pairs
    validation: list[Any]
    tests: dict[str, list[Any]]
    target_tokens: int
    cut: dict[str, float]

    @classmethod
    def of(
        cls,
        splits: Splits,
        name: str,
        tokenizer: Tokenizer,
        model: TrainableModel,
        labels: list[str],
        *,
        max_input: int,
        max_target: int,
        truncate: bool,
    ) -> "EncodedTask":
        """Encodes everything once.

        Args:
            splits: the examples.
            name: of the task, for errors.
            tokenizer: the model's.
            model: whose limits hold.
            labels: of the task, which a classifier chooses from.
            max_input: tokens; 0: as many as the model takes.
            max_target: tokens; 0: as many as the longest training target has.
            truncate: cut what is longer, instead of an error.

        Raises:
            ValueError: a text is too long and is not to be cut; a classifier has nothing to choose.
        """
        wanted = [example.references[0] for example in splits.train]
        if isinstance(model, LabelClassifier):
            if len(labels) < 2:
                raise ValueError(
                    f"head=classifier: all training examples of task={name} have the label "
                    f"{labels[0]!r}; give some of another"
                )
            number = {label: np.array([index]) for index, label in enumerate(labels)}
            targets, longest = [number[label.strip()] for label in wanted], 0
        else:
            targets, _ = encode(
                wanted,
                tokenizer,
                max_target,
                truncate=truncate,
                what=f"target of task={name} train",
            )
            longest = max_target or max(map(len, targets))
        limits = limits_of(model, max_input, longest, truncate=truncate)
        inputs, cut = {}, {}
        for split, examples in splits.named().items():
            inputs[split], n = encode(
                [example.input for example in examples],
                tokenizer,
                limits.input,
                truncate=truncate,
                what=f"input of task={name} {split}",
            )
            cut[split] = n / len(examples)
        return cls(
            Pairs(inputs["train"], targets),
            inputs["validation"],
            {test: inputs[test] for test in splits.tests},
            longest,
            cut,
        )

    def describe(self, model: TrainableModel) -> str:
        """A line for the first screen."""
        lengths = [len(ids) for ids in self.train.inputs]
        sizes = {"train": len(lengths), "validation": len(self.validation)}
        sizes |= {test: len(ids) for test, ids in self.tests.items()}
        parameters = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
        answers = f"targets of at most {self.target_tokens:,}"
        if isinstance(model, LabelClassifier):
            answers = f"{model.n_classes} labels"
        return (
            f"{', '.join(f'{split} {n:,}' for split, n in sizes.items())} examples; inputs of "
            f"{sum(lengths) / len(lengths):.0f} tokens on average, {max(lengths):,} at most"
            f" ({self.cut['train']:.1%} truncated), {answers}; "
            f"{parameters:,} parameters; {type(model).__name__}"
        )
