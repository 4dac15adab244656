"""Intervals cover what they say, pairing finds small gaps, bands hold all lengths at once."""

import numpy as np
import pytest

from evals import stats


def simulate(rng, n_docs=50, doc_sd=0.25, paired_sd=0.015, gap=0.0):
    """50 documents of log-normal length; document effects as in the simulation of the design."""
    tokens = np.exp(rng.normal(8.0, 0.8, n_docs)).astype(int) + 1
    effect = rng.normal(3.0, doc_sd, n_docs)
    noise = rng.normal(0.0, 2.5, n_docs) / np.sqrt(tokens)
    mean_a = effect + noise
    mean_b = mean_a + gap + rng.normal(0.0, paired_sd, n_docs)
    return tokens, mean_a * tokens, mean_b * tokens


def test_clustered_interval_covers_the_truth_90_to_97_percent_of_the_time():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        tokens, sums, _ = simulate(rng)
        low, high = stats.ratio(sums, tokens).ci95
        covered += low <= 3.0 <= high
    assert 0.90 <= covered / 1000 <= 0.97


def test_bootstrap_interval_covers_likewise():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        tokens, sums, _ = simulate(rng)
        low, high = stats.bootstrap_interval(sums, tokens, draws=1000, seed=trial)
        covered += low <= 3.0 <= high
    assert 0.87 <= covered / 300 <= 0.97  # percentile intervals run a little short at 50 documents


def test_pairing_finds_a_hundredth_of_a_nat_where_single_intervals_cannot():
    rng = np.random.default_rng(2)
    found, overlapping, false_alarms = 0, 0, 0
    for _ in range(300):
        tokens, a, b = simulate(rng, gap=0.01)
        found += stats.paired(b, a, tokens).sign() != 0
        interval_a, interval_b = stats.ratio(a, tokens).ci95, stats.ratio(b, tokens).ci95
        overlapping += interval_a[1] >= interval_b[0]
        tokens, a, b = simulate(rng, gap=0.0)
        false_alarms += stats.paired(b, a, tokens).sign() != 0
    assert found / 300 > 0.90
    assert overlapping == 300
    assert false_alarms / 300 < 0.10


def test_simultaneous_band_holds_all_lengths_at_once():
    rng = np.random.default_rng(3)
    inside, inside_single = 0, 0
    for trial in range(300):
        tokens = np.exp(rng.normal(8.0, 0.5, 40))[:, None].repeat(8, axis=1)
        sums = rng.normal(0.0, 0.1, (40, 8)) * tokens
        band = stats.simultaneous_band(sums, tokens, draws=500, seed=trial)
        inside += bool((band[:, 0] <= 0).all() and (band[:, 1] >= 0).all())
        singles = [stats.ratio(sums[:, k], tokens[:, k]).ci95 for k in range(8)]
        inside_single += all(low <= 0 <= high for low, high in singles)
    assert inside / 300 >= 0.92
    assert inside_single / 300 < 0.80


def test_ratio_weights_documents_by_their_tokens():
    estimate = stats.ratio([10.0, 300.0], [10, 100])
    assert estimate.value == pytest.approx(310 / 110)
    assert estimate.n_tokens == 110


def test_documents_without_scored_tokens_do_not_count():
    estimate = stats.ratio([10.0, 0.0, 12.0], [10, 0, 10])
    assert estimate.n_docs == 2


def test_few_documents_are_marked_and_one_has_no_interval():
    assert stats.ratio(np.ones(19), np.ones(19)).n_docs_low
    assert not stats.ratio(np.ones(20), np.ones(20)).n_docs_low
    assert stats.ratio([3.0], [2]).ci95 is None
    with pytest.raises(ValueError, match="n_docs=0"):
        stats.ratio([], [])


def test_bootstrap_is_a_function_of_its_seed():
    sums, weights = np.arange(1.0, 21.0), np.full(20, 2.0)
    first = stats.bootstrap(sums, weights, seed=5)
    assert np.array_equal(first, stats.bootstrap(sums, weights, seed=5))
    assert not np.array_equal(first, stats.bootstrap(sums, weights, seed=6))
