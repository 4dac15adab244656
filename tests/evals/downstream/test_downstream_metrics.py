"""Metrics agree with scipy and with counting by hand; invalid outputs are wrong."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from evals.downstream.examples import Example
from evals.downstream.metrics import combine, contributions


def examples(answers):
    return [Example(str(i), "", (answer,)) for i, answer in enumerate(answers)]


def scores(metrics, predictions, answers, labels=("no", "yes")):
    rows = contributions(metrics, predictions, examples(answers), list(labels))
    return {name: combine(name, values) for name, values in rows.items()}


def test_accuracy_takes_the_exact_word_and_any_reference():
    found = scores(["accuracy"], ["yes", " no\n", "Yes", "yess"], ["yes", "no", "yes", "yes"])
    assert found == {"accuracy": 50.0, "invalid": 50.0}
    several = [Example("0", "", ("yes", "no"))]
    assert contributions(["accuracy"], ["no"], several, ["no", "yes"])["accuracy"] == [100.0]


def test_f1_and_matthews_by_hand():
    # 3 hits, 1 false alarm, 2 missed, 4 rightly left alone.
    said = ["yes"] * 4 + ["no"] * 6
    truth = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    found = scores(["f1", "matthews"], said, truth)
    assert found["f1"] == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 2))
    matthews = (3 * 4 - 1 * 2) / np.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert found["matthews"] == pytest.approx(100 * matthews)


def test_an_invalid_answer_is_the_wrong_one_of_two():
    valid = scores(["f1", "matthews"], ["yes", "no", "no", "yes"], ["yes", "yes", "no", "no"])
    invalid = scores(["f1", "matthews"], ["yes", "?", "no", ""], ["yes", "yes", "no", "no"])
    assert {**invalid, "invalid": 0.0} == valid
    assert invalid["invalid"] == 50.0


def test_correlations_are_scipys():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 26, 80) / 5
    said = np.round(np.clip(truth + rng.normal(size=80), 0, 5), 1)
    found = scores(["pearson", "spearman"], [str(x) for x in said], [str(x) for x in truth])
    assert found["pearson"] == pytest.approx(100 * pearsonr(said, truth)[0])
    assert found["spearman"] == pytest.approx(100 * spearmanr(said, truth)[0])


def test_no_number_counts_as_minus_one():
    truth = ["1.0", "2.0", "3.0"]
    found = scores(["pearson"], ["1.5", "two", "nan"], truth)
    assert found["pearson"] == pytest.approx(100 * pearsonr([1.5, -1, -1], [1, 2, 3])[0])
    assert found["invalid"] == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="its target 'three' is no number"):
        scores(["pearson"], ["1"], ["three"])


def test_a_constant_correlates_with_nothing():
    assert scores(["pearson"], ["0.1"] * 3, ["1", "2", "3"])["pearson"] == 0.0
    assert scores(["matthews"], ["yes"] * 3, ["yes", "no", "no"])["matthews"] == 0.0


def test_two_class_metrics_want_two_classes():
    with pytest.raises(ValueError, match="metrics=f1 is for two classes, and there are 3 labels"):
        scores(["f1"], ["a"], ["a"], ("a", "b", "c"))
