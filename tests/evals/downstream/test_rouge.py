"""ROUGE by hand, and sentences that make Lsum differ from L."""

import pytest

from evals.downstream.baselines import baselines
from evals.downstream.examples import Example
from evals.downstream.rouge import rouge, sentences


def one(prediction, *references):
    return {name: values[0] for name, values in rouge([prediction], [references]).items()}


def test_rouge_by_hand():
    found = one("the cat sat there", "a cat sat here today")
    # Unigrams shared: cat, sat; bigrams: cat sat.
    assert found["rouge1"] == pytest.approx(100 * 2 * (2 / 4) * (2 / 5) / (2 / 4 + 2 / 5))
    assert found["rouge2"] == pytest.approx(100 * 2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert found["rougeL"] == found["rougeLsum"] == found["rouge1"]
    assert set(one("Same words.", "same word").values()) == {100.0}  # stemmed
    assert set(one("", "a word").values()) == {0.0}


def test_sentences_in_another_order_cost_rouge_l_and_not_lsum():
    found = one("It rained. We went home early.", "We went home early. It rained.")
    assert found["rougeLsum"] == 100.0
    assert found["rougeL"] < 80
    # Both words lie in sentences of their own: 2 of 2 and of 4. In one sentence d behind a is lost.
    found = one("d a", "A b. C d.")
    assert found["rougeLsum"] == pytest.approx(100 * 2 * 1 * 0.5 / 1.5)
    assert found["rougeL"] == pytest.approx(100 * 2 * 0.5 * 0.25 / 0.75)


def test_the_best_reference_counts_for_each_measure():
    found = one("a b c d", "a b x y", "d c b a")
    assert found["rouge1"] == 100.0
    assert found["rougeL"] == one("a b c d", "a b x y")["rougeL"] == 50.0


def test_sentences_end_where_the_rule_says():
    text = 'He said "no." Then (why?) he left!\nSee fig. 3.5 of it. The end'
    assert sentences(text) == [
        'He said "no.',
        "Then (why?",
        "he left!",
        "See fig.",
        "3.5 of it.",
        "The end",
    ]
    assert sentences(" \n\n") == []


def test_baselines_are_the_commonest_label_and_the_first_sentences():
    train = [Example("", "", (label,)) for label in ("b", "a", "c", "a", "b")]
    asked = [Example("", "One. Two.\nThree. Four.", ("",))]
    assert baselines("classification", train, 2 * asked) == {"majority class": ["a", "a"]}
    assert baselines("generation", train, asked) == {"lead-3": ["One.\nTwo.\nThree."]}
    assert baselines("regression", train, asked) == {}
