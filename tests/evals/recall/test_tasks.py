"""Examples are what the definitions say, for any size and seed."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.recall.tasks import (
    SPLITS,
    FlagRecall,
    InductionHeads,
    MultiQueryRecall,
    PhoneBook,
    SelectiveCopy,
    generator,
)
from evals.stats import wilson

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def flag_tasks(draw):
    seq_len = draw(st.integers(2, 60))
    return FlagRecall(
        seq_len=seq_len,
        min_distance=draw(st.integers(1, seq_len - 1)),
        n_flags=draw(st.integers(1, 16)),
        n_noise=draw(st.integers(1, 20)),
    )


@st.composite
def multi_query_tasks(draw):
    n_pairs = draw(st.integers(1, 8))
    return MultiQueryRecall(
        seq_len=2 * draw(st.integers(2 * n_pairs, 40)),
        n_pairs=n_pairs,
        vocab_size=2 * draw(st.integers(n_pairs + 1, 200)),
        power=draw(st.sampled_from([0.01, 0.5, 1.0])),
    )


@settings(max_examples=50, deadline=None)
@given(flag_tasks(), SEEDS)
def test_flag_stands_first_and_one_query_far_behind_asks_for_it(task, seed):
    tokens, targets, loss_mask = task.sample(np.random.default_rng(seed), 20)
    assert tokens.shape == targets.shape == loss_mask.shape == (20, task.seq_len)
    assert ((tokens >= 0) & (tokens < task.vocab_size)).all()
    np.testing.assert_array_equal(loss_mask.sum(1), 1)
    distance = loss_mask.argmax(1)
    assert (distance >= task.min_distance).all()
    np.testing.assert_array_equal(tokens == task.query, loss_mask)
    assert (tokens[:, 0] < task.n_flags).all()
    assert (tokens[:, 1:] >= task.n_flags).all()  # nothing but the first token tells the answer
    np.testing.assert_array_equal(targets[loss_mask], tokens[:, 0])


def test_flags_and_distances_are_uniform():
    task = FlagRecall(seq_len=40, min_distance=32)
    tokens, _, loss_mask = task.sample(np.random.default_rng(0), 16_000)
    flags, distances = Counter(tokens[:, 0].tolist()), Counter(loss_mask.argmax(1).tolist())
    assert set(flags) == set(range(16))
    assert set(distances) == set(range(32, 40))
    assert all(abs(count - 1000) < 150 for count in flags.values())  # 5 standard deviations
    assert all(abs(count - 2000) < 210 for count in distances.values())


@settings(max_examples=50, deadline=None)
@given(multi_query_tasks(), SEEDS)
def test_pairs_are_distinct_and_each_key_is_asked_for_once_with_its_value(task, seed):
    tokens, targets, loss_mask = task.sample(np.random.default_rng(seed), 10)
    n, half = task.n_pairs, task.vocab_size // 2
    assert ((tokens >= 0) & (tokens < task.vocab_size)).all()
    for row, answers, asked in zip(tokens, targets, loss_mask, strict=True):
        keys, values = row[0 : 2 * n : 2].tolist(), row[1 : 2 * n : 2].tolist()
        assert len(set(keys)) == len(set(values)) == n
        assert all(1 <= key < half for key in keys)
        assert all(half <= value < task.vocab_size for value in values)
        (places,) = np.nonzero(asked)
        assert len(places) == n
        assert (places >= 2 * n).all()
        assert (places % 2 == 0).all()
        # The context determines the answer: what stands behind the key among the pairs.
        pairs = dict(zip(keys, values, strict=True))
        assert sorted(row[places].tolist()) == sorted(keys)
        assert [pairs[key] for key in row[places]] == answers[places].tolist()


def test_questions_come_early_by_the_power_law():
    task = MultiQueryRecall(seq_len=64, n_pairs=1, vocab_size=64, power=0.01)
    _, _, loss_mask = task.sample(np.random.default_rng(0), 20_000)
    slots = (loss_mask.argmax(1) - 2) // 2
    weight = np.arange(1, 32) ** -0.99
    expected = 20_000 * weight / weight.sum()
    found = np.bincount(slots, minlength=31)
    assert (np.abs(found - expected) < 5 * np.sqrt(expected)).all()


@st.composite
def induction_tasks(draw):
    return InductionHeads(seq_len=draw(st.integers(3, 40)), vocab_size=draw(st.integers(3, 20)))


@st.composite
def selective_copy_tasks(draw):
    n_data = draw(st.integers(1, 8))
    seq_len = draw(st.integers(2 * n_data, 40))
    return SelectiveCopy(seq_len, n_data, vocab_size=draw(st.integers(4, 20)))


@st.composite
def phone_books(draw):
    return PhoneBook(
        n_entries=draw(st.integers(1, 9)),
        name_length=draw(st.integers(2, 3)),
        number_length=draw(st.integers(1, 4)),
        n_letters=draw(st.integers(3, 26)),
    )


def solve_induction(task, row):
    """The definition read off the tokens: {place: answer}."""
    special = task.vocab_size - 1
    first, last = [i for i, token in enumerate(row) if token == special]
    assert last == len(row) - 1
    return {last: row[first + 1]}


def solve_selective_copy(task, row):
    noise, question = 0, task.vocab_size - 1
    data = [token for token in row if token not in (noise, question)]
    asked = [i for i, token in enumerate(row) if token == question]
    assert asked == list(range(len(row) - len(data), len(row)))
    return dict(zip(asked, data, strict=True))


def solve_phone_book(task, row):
    """Reads the book as a person would: letters are a name, digits after them its number."""
    digits, question = task.n_letters, task.n_letters + 10
    asked = row.index(question)
    book, name, number = {}, (), ()
    for token in [*row[:asked], 0]:  # a letter ends the last number
        if token < digits and number:
            assert (len(name), len(number)) == (task.name_length, task.number_length)
            assert name not in book
            book[name], name, number = number, (), ()
        name, number = ((*name, token), ()) if token < digits else (name, (*number, token))
    assert len(book) == task.n_entries
    start = asked + 1 + task.name_length
    number = book[tuple(row[asked + 1 : start])]
    assert tuple(row[start:]) == number[:-1]  # the right digits so far
    return {start - 1 + i: digit for i, digit in enumerate(number)}


SOLVERS = {
    InductionHeads: solve_induction,
    SelectiveCopy: solve_selective_copy,
    PhoneBook: solve_phone_book,
}


@settings(max_examples=90, deadline=None)
@given(st.one_of(induction_tasks(), selective_copy_tasks(), phone_books()), SEEDS)
def test_who_follows_the_definition_gives_exactly_the_answers(task, seed):
    tokens, targets, loss_mask = task.sample(np.random.default_rng(seed), 5)
    assert tokens.shape == targets.shape == loss_mask.shape == (5, task.seq_len)
    assert ((tokens >= 0) & (tokens < task.vocab_size)).all()
    for row, answers, asked in zip(tokens, targets, loss_mask, strict=True):
        places = np.flatnonzero(asked).tolist()
        expected = dict(zip(places, answers[places].tolist(), strict=True))
        assert SOLVERS[type(task)](task, row.tolist()) == expected


@pytest.mark.parametrize(
    "task",
    [InductionHeads(seq_len=40), SelectiveCopy(seq_len=40, n_data=4), PhoneBook(n_entries=8)],
    ids=["induction", "selective_copy", "phonebook"],
)
def test_who_remembers_nothing_is_at_chance_whatever_the_guess(task):
    _, targets, loss_mask = task.sample(np.random.default_rng(0), 6000)
    # One answer of a document each: several are not independent.
    answers = targets[np.arange(6000), loss_mask.argmax(1)]
    values, counts = np.unique(answers, return_counts=True)
    assert len(values) == round(1 / task.chance)
    shares = counts / 6000
    assert np.abs(shares - task.chance).max() < 5 * np.sqrt(task.chance / 6000)
    low, high = wilson(counts[0], 6000)
    assert low <= task.chance <= high


def test_where_the_answer_stands_is_uniform():
    tokens, _, _ = InductionHeads(seq_len=12).sample(np.random.default_rng(0), 10_000)
    places = np.bincount((tokens == 15).argmax(1), minlength=12)
    assert (np.abs(places[:10] - 1000) < 150).all()
    assert not places[10:].any()
    tokens, _, _ = SelectiveCopy(seq_len=14, n_data=4).sample(np.random.default_rng(0), 5000)
    np.testing.assert_array_less(np.abs((tokens[:, :10] > 0).mean(0) - 0.4), 0.035)


@pytest.mark.parametrize(
    "task",
    [
        FlagRecall(seq_len=20, min_distance=8),
        MultiQueryRecall(seq_len=32, n_pairs=4),
        InductionHeads(seq_len=40),
        SelectiveCopy(seq_len=40, n_data=8),
        PhoneBook(n_entries=4),
    ],
    ids=["flag", "mqar", "induction", "selective_copy", "phonebook"],
)
def test_seeds_and_splits_fix_the_examples_and_share_none(task):
    drawn = {}
    for seed in (0, 1):
        for split in SPLITS:
            examples = task.sample(generator(seed, split), 50)
            again = task.sample(generator(seed, split), 50)
            for array, same in zip(examples, again, strict=True):
                np.testing.assert_array_equal(array, same)
            drawn[seed, split] = {row.tobytes() for row in examples.tokens}
    assert sum(map(len, drawn.values())) == len(set.union(*drawn.values()))


def test_stretched_tasks_ask_from_further_away():
    task = FlagRecall(seq_len=20, min_distance=8).stretched(4)
    assert (task.seq_len, task.min_distance) == (80, 32)
    assert MultiQueryRecall(seq_len=32, n_pairs=4).stretched(4).seq_len == 128
    assert InductionHeads(seq_len=32).stretched(4).seq_len == 128
    assert SelectiveCopy(seq_len=32, n_data=4).stretched(4) == SelectiveCopy(seq_len=128, n_data=4)
    assert PhoneBook(n_entries=4).stretched(4).n_entries == 16


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: FlagRecall(seq_len=8, min_distance=8), "min_distance=8 does not fit"),
        (lambda: FlagRecall(seq_len=8, min_distance=0), "min_distance=0"),
        (lambda: MultiQueryRecall(seq_len=31, n_pairs=2), "seq_len=31"),
        (lambda: MultiQueryRecall(seq_len=32, n_pairs=9), "n_pairs=9 does not fit"),
        (lambda: MultiQueryRecall(seq_len=32, n_pairs=4, vocab_size=8), "room|vocab_size=8"),
        (lambda: InductionHeads(seq_len=2), "seq_len=2"),
        (lambda: SelectiveCopy(seq_len=15, n_data=8), "n_data=8 does not fit"),
        (lambda: SelectiveCopy(seq_len=16, n_data=8, vocab_size=3), "vocab_size=3"),
        (lambda: PhoneBook(n_entries=0), "n_entries=0"),
        (lambda: PhoneBook(n_entries=27, name_length=1), "26 names"),
        (lambda: PhoneBook(n_entries=400).stretched(2), "n_entries=800 does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(build, reason):
    with pytest.raises(ValueError, match=reason):
        build()
