"""Recall tasks as pure generators of token batches: what to read, what to answer, where it counts.

Shapes: B examples, T tokens.

Only answers are scored, in training too: all other tokens are noise that no model can predict, and
their loss would hide the answer's.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

# No two draw from one stream of random numbers.
SPLITS = ("train", "validation", "test", "long")


class Examples(NamedTuple):
    """tokens, targets: (B, T) int64; loss_mask: (B, T) bool, True where `targets` is an answer,
    which the model gives at the token that asks for it (there is no shift)."""

    tokens: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray


class RecallTask(Protocol):
    """A distribution over examples; a frozen dataclass, whose fields say which.

    Attributes:
        vocab_size: tokens and answers are below it.
        seq_len: T.
        chance: accuracy of a guess among all possible answers.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def chance(self) -> float: ...

    def sample(self, rng: np.random.Generator, n_examples: int) -> Examples:
        """Draws examples; the same state of `rng` gives the same ones."""
        ...

    def stretched(self, factor: int) -> "RecallTask":
        """The same task `factor` times as long, for testing beyond the trained length."""
        ...


def generator(seed: int, split: str, factor: int = 1) -> np.random.Generator:
    """The random numbers of a split for one seed; documents `factor` times as long have others."""
    return np.random.default_rng([seed, SPLITS.index(split), factor])


@dataclass(frozen=True)
class FlagRecall:
    """A flag at the document's start, noise, a query; the answer is the flag.

        f  ~ ~ ~ ~ ~ ~ ~ ~  ?  ~ ~ ~        ~: noise, ?: the query, where f is to be answered

    The distance from flag to query is uniform in [min_distance, T - 1], so that no fixed lag will
    do; with min_distance = 2 x layers x window nothing passes from window to window up to the
    query. Noise has symbols of its own: what is asked is whether a state *keeps* something. If
    flags were noise too, a layer would first have to tell the first token from all others, which
    SPADE's only global layer, a linear filter of the embeddings, cannot by construction, however
    long its memory: that is selection, and MQAR tests it.

    Attributes:
        seq_len: T.
        min_distance: tokens from flag to query, at least.
        n_flags: symbols 0 .. n_flags - 1; guessing gives 1 / n_flags.
        n_noise: further symbols; the last id of the vocabulary is the query.
    """

    seq_len: int
    min_distance: int
    n_flags: int = 16
    n_noise: int = 15

    def __post_init__(self) -> None:
        if not 1 <= self.min_distance < self.seq_len:
            raise ValueError(
                f"min_distance={self.min_distance} does not fit into seq_len={self.seq_len}: the "
                f"query stands that far behind the first token"
            )

    @property
    def query(self) -> int:
        return self.n_flags + self.n_noise

    @property
    def vocab_size(self) -> int:
        return self.query + 1

    @property
    def chance(self) -> float:
        return 1 / self.n_flags

    def sample(self, rng: np.random.Generator, n_examples: int) -> Examples:
        tokens = rng.integers(self.n_flags, self.query, size=(n_examples, self.seq_len))
        flags = rng.integers(self.n_flags, size=n_examples)
        distance = rng.integers(self.min_distance, self.seq_len, size=n_examples)
        rows = np.arange(n_examples)
        tokens[:, 0] = flags
        tokens[rows, distance] = self.query
        targets, loss_mask = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
        targets[rows, distance] = flags
        loss_mask[rows, distance] = True
        return Examples(tokens, targets, loss_mask)

    def stretched(self, factor: int) -> "FlagRecall":
        return replace(self, seq_len=factor * self.seq_len, min_distance=factor * self.min_distance)


@dataclass(frozen=True)
class MultiQueryRecall:
    """MQAR, multi-query associative recall (Arora et al. 2023, 2312.04927), as their code draws it.

        k1 v1 k2 v2 ... kn vn  ~ ~ k2 ~ ~ ~ k1 ~ ...        at each later k the answer is its v

    Keys are n different ids of [1, V/2), values n different ids of [V/2, V). Each key is asked for
    once, at an even offset 2 g behind the pairs, where the g are drawn without replacement with
    P(g) ~ (g + 1)^(power - 1): most questions come early. All else is filled with ids from the
    whole vocabulary, which may be keys or values too (their `random_non_queries`).

    `chance` is a guess among all values; one who remembers the values and not their keys has 1 / n.

    Attributes:
        seq_len: T, even.
        n_pairs: n, at most T / 4.
        vocab_size: V, even.
        power: of the distribution of gaps; 1 is uniform.
    """

    seq_len: int
    n_pairs: int
    vocab_size: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.seq_len % 2 or self.vocab_size % 2:
            raise ValueError(
                f"seq_len={self.seq_len} and vocab_size={self.vocab_size} must both be even"
            )
        if not 1 <= self.n_pairs <= min(self.seq_len // 4, self.vocab_size // 2 - 1):
            raise ValueError(
                f"n_pairs={self.n_pairs} does not fit: seq_len={self.seq_len} has room for "
                f"{self.seq_len // 4} pairs and questions, vocab_size={self.vocab_size} for "
                f"{self.vocab_size // 2 - 1} keys"
            )

    @property
    def chance(self) -> float:
        return 2 / self.vocab_size

    def sample(self, rng: np.random.Generator, n_examples: int) -> Examples:
        half, n = self.vocab_size // 2, self.n_pairs
        keys = 1 + _distinct(rng, np.zeros(half - 1), n_examples, n)
        values = half + _distinct(rng, np.zeros(half), n_examples, n)
        slots = (self.seq_len - 2 * n) // 2
        log_weight = (self.power - 1) * np.log(np.arange(1, slots + 1))
        asked = 2 * n + 2 * _distinct(rng, log_weight, n_examples, n)

        tokens = rng.integers(self.vocab_size, size=(n_examples, self.seq_len))
        tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
        targets, loss_mask = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
        np.put_along_axis(tokens, asked, keys, axis=1)
        np.put_along_axis(targets, asked, values, axis=1)
        np.put_along_axis(loss_mask, asked, True, axis=1)
        return Examples(tokens, targets, loss_mask)

    def stretched(self, factor: int) -> "MultiQueryRecall":
        return replace(self, seq_len=factor * self.seq_len)


@dataclass(frozen=True)
class InductionHeads:
    """The token behind a special one, at the special one's second appearance.

        ~ ~ ~ *  a  ~ ~ ~ ~ ~ ~ ~ *                  ~: any of V - 1 symbols; at the last * a is due

    The task of Fu et al. (2022, 2212.14052) in the setting of Gu & Dao (2023, 2312.00752): trained
    on 256 tokens of a vocabulary of 16, tested on 64 to 1,048,576. The first * is uniform over all
    places that leave room for a, which so stands 1 to T - 2 tokens before the question: what a
    window alone gets right beyond `chance` are the nearest of these.

    Attributes:
        seq_len: T.
        vocab_size: V, of which the last id is *.
    """

    seq_len: int = 256
    vocab_size: int = 16

    def __post_init__(self) -> None:
        if self.seq_len < 3 or self.vocab_size < 3:
            raise ValueError(
                f"seq_len={self.seq_len}, vocab_size={self.vocab_size}: the special token, what "
                f"follows it and the question need 3 places, and two symbols a third id"
            )

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def sample(self, rng: np.random.Generator, n_examples: int) -> Examples:
        special, rows = self.vocab_size - 1, np.arange(n_examples)
        tokens = rng.integers(special, size=(n_examples, self.seq_len))
        first = rng.integers(self.seq_len - 2, size=n_examples)
        tokens[rows, first] = tokens[:, -1] = special
        targets, loss_mask = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
        targets[:, -1] = tokens[rows, first + 1]
        loss_mask[:, -1] = True
        return Examples(tokens, targets, loss_mask)

    def stretched(self, factor: int) -> "InductionHeads":
        return replace(self, seq_len=factor * self.seq_len)


@dataclass(frozen=True)
class SelectiveCopy:
    """Data tokens among noise, to be repeated in their order at the end.

        ~ a ~ ~ b ~ ~ ~ c ~ ~ ?  ?  ?        ~: the one noise token; at the ?s a, b, c are due

    Selective copying of Gu & Dao (2023, 2312.00752): 16 data tokens and a vocabulary of 16 in 4,096
    tokens, which here count the ?s. Data tokens stand at random places, so that no fixed lag will
    do, and may repeat. Ids are 0 for noise, 1 .. V - 2 for data and V - 1 for ?.

    Attributes:
        seq_len: T, with n_data questions at its end.
        n_data: tokens to repeat.
        vocab_size: V.
    """

    seq_len: int = 4096
    n_data: int = 16
    vocab_size: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.n_data <= self.seq_len // 2:
            raise ValueError(
                f"n_data={self.n_data} does not fit into seq_len={self.seq_len}: each takes a "
                f"place to stand and one to be asked for"
            )
        if self.vocab_size < 4:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least 4: noise, question, two data tokens"
            )

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def sample(self, rng: np.random.Generator, n_examples: int) -> Examples:
        n_context = self.seq_len - self.n_data
        places = np.sort(_distinct(rng, np.zeros(n_context), n_examples, self.n_data), axis=1)
        data = rng.integers(1, self.vocab_size - 1, size=(n_examples, self.n_data))
        tokens = np.zeros((n_examples, self.seq_len), dtype=np.int64)
        np.put_along_axis(tokens, places, data, axis=1)
        tokens[:, n_context:] = self.vocab_size - 1
        targets, loss_mask = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
        targets[:, n_context:] = data
        loss_mask[:, n_context:] = True
        return Examples(tokens, targets, loss_mask)

    def stretched(self, factor: int) -> "SelectiveCopy":
        return replace(self, seq_len=factor * self.seq_len)


@dataclass(frozen=True)
class PhoneBook:
    """Names with numbers; one name is asked for, and its number is given digit by digit.

        A K 3 1 4   Q B 2 7 1   ...   ? Q B 2 7                       at the last B 2 7 the 2 7 1

    The lookup of Jelassi et al. (2024, 2402.01032), who try it on pretrained models over text; in
    synthetic tokens, and trained from scratch, it is ours, as are its sizes. Names of a book are
    different but may share letters: only all of them tell a name. The right digits so far are
    shown: an answer is one digit.

    Attributes:
        n_entries: N of a book; a stretched book has more of them.
        name_length: letters of a name.
        number_length: digits of a number.
        n_letters: ids 0 .. n_letters - 1; then come ten digits and the question mark.
    """

    n_entries: int
    name_length: int = 2
    number_length: int = 4
    n_letters: int = 26

    def __post_init__(self) -> None:
        if min(self.n_entries, self.name_length, self.number_length) < 1:
            raise ValueError(
                f"n_entries={self.n_entries}, name_length={self.name_length}, "
                f"number_length={self.number_length} must all be at least 1"
            )
        if self.n_entries > self.n_letters**self.name_length:
            raise ValueError(
                f"n_entries={self.n_entries} does not fit: {self.name_length} letters of "
                f"{self.n_letters} make {self.n_letters**self.name_length} names; use a larger "
                f"name_length or n_letters"
            )

    @property
    def entry_length(self) -> int:
        return self.name_length + self.number_length

    @property
    def seq_len(self) -> int:
        return (self.n_entries + 1) * self.entry_length

    @property
    def vocab_size(self) -> int:
        return self.n_letters + 11

    @property
    def chance(self) -> float:
        return 1 / 10

    def sample(self, rng: np.random.Generator, n_examples: int) -> Examples:
        question = self.n_letters + 10
        n_names = self.n_letters**self.name_length
        names = _distinct(rng, np.zeros(n_names), n_examples, self.n_entries)
        power = self.n_letters ** np.arange(self.name_length)
        letters = names[..., None] // power % self.n_letters
        digits = self.n_letters + rng.integers(
            10, size=(n_examples, self.n_entries, self.number_length)
        )
        entries = np.concatenate([letters, digits], axis=2)
        asked = entries[np.arange(n_examples), rng.integers(self.n_entries, size=n_examples)]
        # The last digit is an answer and no input, which is the place of the question mark.
        asking = np.concatenate([np.full((n_examples, 1), question), asked[:, :-1]], axis=1)
        tokens = np.concatenate([entries.reshape(n_examples, -1), asking], axis=1)
        targets, loss_mask = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
        targets[:, -self.number_length :] = asked[:, -self.number_length :]
        loss_mask[:, -self.number_length :] = True
        return Examples(tokens, targets, loss_mask)

    def stretched(self, factor: int) -> "PhoneBook":
        return replace(self, n_entries=factor * self.n_entries)


def _distinct(
    rng: np.random.Generator, log_weight: np.ndarray, n_examples: int, size: int
) -> np.ndarray:
    """(n_examples, size) different indices per row, drawn one after the other by weight.

    The largest of log weight plus Gumbel noise are such a draw (Vieira 2014).
    """
    scores = log_weight + rng.gumbel(size=(n_examples, len(log_weight)))
    top = np.argpartition(scores, -size, axis=1)[:, -size:]
    return np.take_along_axis(top, np.argsort(-np.take_along_axis(scores, top, 1), axis=1), axis=1)
