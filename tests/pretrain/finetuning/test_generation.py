"""Beams find what trying every text finds; greedy is one beam; nobody minds the company."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.tokenizer import EOS_ID
from pretrain.finetuning.generation import GenerationOptions, generate

VOCAB, MAX = 4, 4


class Table:
    """Any text at any probability: logits are drawn by the input and what is written so far."""

    vocab_size, first_token = VOCAB, 3
    device = torch.device("cpu")

    def __init__(self, *, one_length=False):
        self.module = torch.nn.Identity()
        self.one_length = one_length
        self.started = []

    def start(self, inputs):
        self.started.append([len(one) for one in inputs])
        return torch.tensor([[int(one[0])] for one in inputs])

    def step(self, tokens, state):
        state = torch.cat([state, tokens.unsqueeze(1)], 1)
        rows = [np.random.default_rng(row).normal(size=VOCAB) for row in state.tolist()]
        return torch.tensor(np.stack(rows), dtype=torch.float32), state

    def select(self, state, lanes):
        return state[lanes]


def score(one, text, penalty):
    """Of a text, written or not to be ended within MAX."""
    history, total = [int(one[0]), Table.first_token], 0.0
    for token in text:
        logits = torch.tensor(np.random.default_rng(history).normal(size=VOCAB))
        total += float(logits.log_softmax(-1)[token])
        history.append(token)
    return total / len(text) ** penalty


def by_force(one, penalty, allowed=lambda text: True):
    """The best text of all that are allowed."""
    others = [token for token in range(VOCAB) if token != EOS_ID]
    texts = [
        [*body, EOS_ID] for n in range(MAX) for body in itertools.product(others, repeat=n)
    ] + [list(body) for body in itertools.product(others, repeat=MAX)]
    return max(filter(allowed, texts), key=lambda text: score(one, text, penalty))


def ended(text):
    return list(text) if len(text) == MAX else [*text, EOS_ID]


INPUTS = [np.array([i]) for i in range(12)]


@pytest.mark.parametrize("penalty", [0.0, 0.6, 2.0])
def test_wide_beams_find_the_best_of_all_texts(penalty):
    options = GenerationOptions(MAX, beams=27, length_penalty=penalty, lanes=27 * 5)
    found = generate(Table(), INPUTS, options)
    best = [by_force(one, penalty) for one in INPUTS]
    assert [ended(text) for text in found] == best
    assert len({len(text) for text in best}) > 1


def test_a_length_penalty_lengthens():
    def mean(penalty):
        options = GenerationOptions(MAX, beams=8, length_penalty=penalty)
        return np.mean([len(text) for text in generate(Table(), INPUTS, options)])

    assert mean(0.0) < mean(2.0)


def test_few_beams_are_at_least_as_good_as_greedy_on_average():
    def mean(beams):
        options = GenerationOptions(MAX, beams=beams, length_penalty=0.0)
        texts = generate(Table(), INPUTS, options)
        return np.mean(
            [score(one, ended(text), 0.0) for one, text in zip(INPUTS, texts, strict=True)]
        )

    assert mean(1) < mean(3) <= mean(27)


def test_greedy_takes_the_likeliest_token_until_eos():
    for one, text in zip(INPUTS, generate(Table(), INPUTS, GenerationOptions(MAX)), strict=True):
        history = [int(one[0]), Table.first_token]
        for token in ended(text):
            assert np.random.default_rng(history).normal(size=VOCAB).argmax() == token
            history.append(token)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_no_tokens_in_a_row_come_again_and_what_does_not_repeat_stays(beams, size):
    options = GenerationOptions(8, beams=beams, length_penalty=2.0)
    free = generate(Table(), INPUTS, options)
    bound = generate(Table(), INPUTS, replace(options, no_repeat_ngram_size=size))
    assert any(map(repeats, free, [size] * 12))
    assert not any(map(repeats, bound, [size] * 12))
    for one, other in zip(free, bound, strict=True):
        if beams == 1:  # more beams lose rivals, too
            assert repeats(one, size) or list(one) == list(other)


def repeats(text, size):
    rows = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
    return len(set(rows)) < len(rows)


def test_wide_beams_find_the_best_of_texts_without_repeats():
    options = GenerationOptions(MAX, beams=27, lanes=27 * 5, no_repeat_ngram_size=1)
    best = [by_force(one, 1.0, lambda text: not repeats(text, 1)) for one in INPUTS]
    assert [ended(text) for text in generate(Table(), INPUTS, options)] == best


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_do_not_depend_on_the_batch_and_keep_their_order(beams):
    inputs = [np.full(1 + i % 3, i) for i in range(10)]
    together = generate(Table(), inputs, GenerationOptions(MAX, beams=beams))
    alone = [generate(Table(), [one], GenerationOptions(MAX, beams=beams))[0] for one in inputs]
    assert [list(text) for text in together] == [list(text) for text in alone]


def test_lanes_bound_a_batch_and_lengths_are_not_mixed_where_they_must_not_be():
    inputs = [np.full(1 + i % 3, i) for i in range(10)]
    model = Table()
    generate(model, inputs, GenerationOptions(MAX, beams=2, lanes=8))
    assert max(map(len, model.started)) == 4
    assert any(len(set(lengths)) > 1 for lengths in model.started)
    model = Table(one_length=True)
    generate(model, inputs, GenerationOptions(MAX))
    assert sorted(map(len, model.started)) == [3, 3, 4]
    assert all(len(set(lengths)) == 1 for lengths in model.started)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="lanes=2: one example needs beams=4"):
        GenerationOptions(3, beams=4, lanes=2)
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        GenerationOptions(0)
    with pytest.raises(ValueError, match="no_repeat_ngram_size=-1 must not be negative"):
        GenerationOptions(3, no_repeat_ngram_size=-1)
