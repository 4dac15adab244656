"""Intervals cover, and pairing removes what two models share."""

import numpy as np

from evals.downstream.intervals import difference, interval


def test_the_interval_of_a_share_is_the_normal_one():
    scores = 100.0 * (np.arange(1000) % 4 == 0)
    found = interval("accuracy", [scores])
    half = 1.96 * np.sqrt(0.25 * 0.75 / 1000) * 100
    assert found.value == 25.0
    np.testing.assert_allclose([found.low, found.high], [25 - half, 25 + half], atol=0.4)


def test_intervals_of_a_correlation_cover_the_truth():
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        pairs = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=200)
        found = interval("pearson", [pairs], draws=200)
        covered += found.low < 60 < found.high
    assert covered >= 34


def test_a_paired_difference_is_narrow_where_examples_are_hard_for_both():
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 20, 300)
    ours, theirs = [hard + 2 + rng.normal(size=300)], [hard + rng.normal(size=300)]
    found = difference("rougeL", ours, theirs)
    assert 1.5 < found.low < 2 < found.high < 2.5
    alone = interval("rougeL", ours)
    assert alone.high - alone.low > 5 * (found.high - found.low)
    assert difference("rougeL", ours, ours) == (0.0, 0.0, 0.0)


def test_of_several_seeds_the_mean_counts():
    seeds = [np.full(20, 40.0), np.full(20, 60.0)]
    assert interval("accuracy", seeds) == (50.0, 50.0, 50.0)
