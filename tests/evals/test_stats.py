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


def test_intervals_cover_the_truth_90_to_97_percent_of_the_time():
    """2,000 evaluations: a share of 0.95 is seen to 0.5 points."""
    rng = np.random.default_rng(0)
    covered, covered_difference = 0, 0
    for _ in range(2000):
        tokens, a, b = simulate(rng, gap=0.01)
        low, high = stats.ratio(a, tokens).ci95
        covered += low <= 3.0 <= high
        low, high = stats.ratio(b - a, tokens).ci95
        covered_difference += low <= 0.01 <= high
    assert 0.90 <= covered / 2000 <= 0.97
    assert 0.90 <= covered_difference / 2000 <= 0.97


def test_pairing_finds_a_hundredth_of_a_nat_where_single_intervals_cannot():
    rng = np.random.default_rng(2)
    found, overlapping, false_alarms = 0, 0, 0
    for _ in range(1000):
        tokens, a, b = simulate(rng, gap=0.01)
        found += stats.ratio(b - a, tokens).sign() == 1
        interval_a, interval_b = stats.ratio(a, tokens).ci95, stats.ratio(b, tokens).ci95
        overlapping += interval_a[1] >= interval_b[0]
        tokens, a, b = simulate(rng, gap=0.0)
        false_alarms += stats.ratio(b - a, tokens).sign() != 0
    assert found / 1000 > 0.90
    assert overlapping == 1000
    assert false_alarms / 1000 < 0.10


@pytest.mark.parametrize(
    ("n_docs", "length_sd", "shared"),
    [(50, 0.8, 0.0), (50, 0.8, 0.9), (20, 0.8, 0.9), (8, 0.0, 0.0)],
)
def test_simultaneous_band_holds_a_curve_over_eight_contexts_at_once(n_docs, length_sd, shared):
    """Paired differences whose errors are apart, or mostly a document's own at all contexts."""
    rng = np.random.default_rng(3)
    n_trials, contexts = 250, 8
    inside, inside_singles = 0, 0
    for trial in range(n_trials):
        tokens = np.exp(rng.normal(8.0, length_sd, n_docs))[:, None].repeat(contexts, axis=1)
        effect = np.sqrt(shared) * rng.normal(0.0, 0.015, (n_docs, 1))
        effect = effect + np.sqrt(1 - shared) * rng.normal(0.0, 0.015, (n_docs, contexts))
        band = stats.simultaneous_band(effect * tokens, tokens, draws=400, seed=trial)
        inside += bool((band[:, 0] <= 0).all() and (band[:, 1] >= 0).all())
        singles = [stats.ratio(effect[:, k] * tokens[:, k], tokens[:, k]).ci95 for k in range(8)]
        inside_singles += all(low <= 0 <= high for low, high in singles)
    assert 0.92 <= inside / n_trials <= 0.99
    # What single intervals would do to a verdict "better at some context".
    assert inside_singles / n_trials < (0.90 if shared else 0.75)


def test_a_band_of_one_context_is_its_interval():
    rng = np.random.default_rng(4)
    tokens, sums, _ = simulate(rng)
    (band,) = stats.simultaneous_band(sums[:, None], tokens[:, None], draws=200)
    low, high = stats.ratio(sums, tokens).ci95
    assert band.tolist() == pytest.approx([low, high])


def test_documents_without_weight_leave_a_band_unchanged_and_one_has_none():
    tokens, sums, _ = simulate(np.random.default_rng(5))
    alone = stats.simultaneous_band(sums[:, None], tokens[:, None])
    padded = stats.simultaneous_band(np.append(sums, 0.0)[:, None], np.append(tokens, 0)[:, None])
    np.testing.assert_array_equal(padded, alone)
    assert stats.simultaneous_band(sums[:1, None], tokens[:1, None]) is None


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


def test_a_band_is_a_function_of_its_seed_however_many_draws_run_at_once(monkeypatch):
    rng = np.random.default_rng(6)
    sums, weights = rng.normal(size=(30, 2)), rng.uniform(1, 2, (30, 2))
    whole = stats.simultaneous_band(sums, weights, draws=50)
    assert np.array_equal(whole, stats.simultaneous_band(sums, weights, draws=50))
    assert not np.array_equal(whole, stats.simultaneous_band(sums, weights, draws=50, seed=1))
    monkeypatch.setattr(stats, "COUNTS_AT_ONCE", 30 * 7)
    parts = stats.simultaneous_band(sums, weights, draws=50)
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


def test_slope_is_weighted_least_squares_with_the_sandwich_error():
    """Against the normal equations, and HC3 written out with the hat matrix."""
    rng = np.random.default_rng(5)
    n_docs = 9
    x, weights = np.sort(rng.random(n_docs)), rng.integers(50, 500, n_docs).astype(float)
    y = 0.3 + 0.2 * x + rng.normal(0, 0.05, n_docs)
    estimate = stats.slope(x, y * weights, weights)
    design, scale = np.stack([np.ones(n_docs), x], axis=1), np.diag(weights)
    bread = np.linalg.inv(design.T @ scale @ design)
    coefficients = bread @ design.T @ scale @ y
    leverage = np.diag(design @ bread @ design.T @ scale)
    residual = (y - design @ coefficients) / (1 - leverage)
    error = bread @ design.T @ scale @ np.diag(residual**2) @ scale @ design @ bread
    assert estimate.value == pytest.approx(coefficients[1])
    assert estimate.se == pytest.approx(np.sqrt(error[1, 1]))


def test_slope_intervals_of_a_dozen_documents_cover_the_truth():
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(1000):
        tokens = np.exp(rng.normal(8.0, 0.6, 12))
        x = (np.cumsum(tokens) - tokens / 2) / tokens.sum()
        mean = 0.02 * x + rng.normal(0.0, 0.015, 12)
        low, high = stats.slope(x, mean * tokens, tokens).ci95
        covered += low <= 0.02 <= high
    assert 0.93 <= covered / 1000 <= 0.99
    with pytest.raises(ValueError, match="three documents"):
        stats.slope(x[:2], mean[:2], tokens[:2])
