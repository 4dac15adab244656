"""Metrics in percent: what each example contributes, and what any sample of examples makes of it.

An output of a classifier that is none of the task's labels is invalid and counts as wrong; where a
metric knows two classes only, as the one that is wrong. An output of a regression that is no number
counts as -1, as in T5's evaluation of STS-B. The share of such outputs is listed as `invalid`.

Shapes: n examples.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from evals.downstream.examples import Example
from evals.downstream.rouge import MEASURES, rouge

INVALID = "invalid"


class Metric(NamedTuple):
    """Attributes:
    kind: classification, regression or generation.
    combine: (n, 2) of prediction and truth, or (n,) scores in percent, -> percent.
    """

    kind: str
    combine: Callable[[np.ndarray], float]


def mean(scores: np.ndarray) -> float:
    """The mean of (n,) scores."""
    return float(scores.mean())


def f1(pairs: np.ndarray) -> float:
    """F1 of the positive class; 0 where nothing is positive and nothing is said to be."""
    predicted, truth = pairs.astype(bool).T
    hits = int((predicted & truth).sum())
    return 200.0 * hits / max(1, int(predicted.sum() + truth.sum()))


def correlation(pairs: np.ndarray) -> float:
    """Pearson's; of two classes it is Matthews'. 0 where one side is constant."""
    predicted, truth = (pairs - pairs.mean(0)).T
    # A mean of equal numbers may be off by rounding.
    if not np.ptp(pairs, axis=0).all():
        return 0.0
    return float(100 * (predicted @ truth) / np.sqrt((predicted @ predicted) * (truth @ truth)))


def rank_correlation(pairs: np.ndarray) -> float:
    """Spearman's, equal values sharing their mean rank."""
    return correlation(rankdata(pairs, axis=0))


METRICS = {
    "accuracy": Metric("classification", mean),
    "f1": Metric("classification", f1),
    "matthews": Metric("classification", correlation),
    "pearson": Metric("regression", correlation),
    "spearman": Metric("regression", rank_correlation),
    **{measure: Metric("generation", mean) for measure in MEASURES},
}


def contributions(
    metrics: Sequence[str],
    predictions: Sequence[str],
    examples: Sequence[Example],
    labels: Sequence[str],
) -> dict[str, np.ndarray]:
    """What each example gives to each metric, and `invalid` but for generation.

    Args:
        metrics: of one kind.
        predictions: one text per example.
        examples: with the answers.
        labels: of the task; for two-class metrics the positive one is the last of two.

    Raises:
        ValueError: a two-class metric, and not two labels; an answer that should be a number.
    """
    kind = METRICS[metrics[0]].kind
    if kind == "generation":
        everything = rouge(predictions, [example.references for example in examples])
        return {name: everything[name] for name in metrics}
    answers = [example.references[0].strip() for example in examples]
    said = [text.strip() for text in predictions]
    if kind == "regression":
        values = np.array([_number(text) for text in said])
        truth = np.array([_number(text) for text in answers])
        if np.isnan(truth).any():
            wrong = examples[int(np.isnan(truth).argmax())]
            raise ValueError(
                f"{wrong.id}: its target {wrong.references[0]!r} is no number, which "
                f"metrics={','.join(metrics)} need"
            )
        invalid = np.isnan(values)
        rows = np.stack([np.where(invalid, -1.0, values), truth], 1)
        return {**dict.fromkeys(metrics, rows), INVALID: 100.0 * invalid}
    result = {}
    for name in metrics:
        if name == "accuracy":
            right = [
                text in [reference.strip() for reference in example.references]
                for text, example in zip(said, examples, strict=True)
            ]
            result[name] = 100.0 * np.array(right)
            continue
        if len(labels) != 2:
            raise ValueError(
                f"metrics={name} is for two classes, and there are {len(labels)} labels; use "
                f"metrics=accuracy"
            )
        truth = np.array([text == labels[1] for text in answers])
        positive = np.array([text == labels[1] for text in said])
        known = np.array([text in labels for text in said])
        result[name] = np.stack([np.where(known, positive, ~truth), truth], 1).astype(float)
    result[INVALID] = 100.0 * np.array([text not in labels for text in said])
    return result


def combine(name: str, rows: np.ndarray) -> float:
    """The metric of a sample of examples, in percent.

    Args:
        name: of `METRICS`, or `invalid`.
        rows: of `contributions`.
    """
    return METRICS[name].combine(rows) if name in METRICS else mean(rows)


def _number(text: str) -> float:
    """NaN where the text is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
