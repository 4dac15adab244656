"""What costs no training: the commonest label, and the first sentences of the input."""

from collections import Counter
from collections.abc import Sequence

from evals.downstream.examples import Example
from evals.downstream.rouge import sentences

LEAD = 3


def majority(train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """The commonest target of training, of several the first in the alphabet."""
    counts = Counter(example.references[0] for example in train)
    commonest = min(counts, key=lambda label: (-counts[label], label))
    return [commonest] * len(examples)


def lead(examples: Sequence[Example]) -> list[str]:
    """The first `LEAD` sentences of each input."""
    return ["\n".join(sentences(example.input)[:LEAD]) for example in examples]


def baselines(
    kind: str, train: Sequence[Example], examples: Sequence[Example]
) -> dict[str, list[str]]:
    """Outputs by name of baseline; none for a regression, where a constant correlates with nothing.

    Args:
        kind: of the task.
        train: its training examples.
        examples: to be answered.
    """
    if kind == "classification":
        return {"majority class": majority(train, examples)}
    return {f"lead-{LEAD}": lead(examples)} if kind == "generation" else {}
