"""95 % bootstrap intervals over examples of any metric, and of paired differences.

Examples are drawn with replacement, the same ones for all seeds of a training and for both sides of
a difference; of several seeds the mean counts. This is the spread of the test set, with the seeds
as they are: what other seeds would do is not in it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evals.downstream.metrics import combine

DRAWS = 1000


class Interval(NamedTuple):
    """In percent, or points of it."""

    value: float
    low: float
    high: float


def interval(name: str, seeds: Sequence[np.ndarray], draws: int = DRAWS) -> Interval:
    """The metric's mean over seeds.

    Args:
        name: of a metric.
        seeds: `contributions` of each seed's outputs for the same examples.
        draws: resamplings.
    """
    return difference(name, seeds, [], draws)


def difference(
    name: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], draws: int = DRAWS
) -> Interval:
    """By how much the first is above the second, example by example.

    Args:
        name: of a metric.
        ours: `contributions` of each seed's outputs.
        theirs: likewise, of the same examples; none: 0 is subtracted.
        draws: resamplings.
    """
    n = len(ours[0])
    rng = np.random.default_rng(0)

    def value(chosen: np.ndarray | slice) -> float:
        mine = np.mean([combine(name, rows[chosen]) for rows in ours])
        other = np.mean([combine(name, rows[chosen]) for rows in theirs]) if theirs else 0.0
        return float(mine - other)

    drawn = [value(rng.integers(n, size=n)) for _ in range(draws)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value(slice(None)), float(low), float(high))
