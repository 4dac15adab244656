"""The yardstick: an interpolated 5-gram model over bytes, trained on the same text, in numpy.

Modified Kneser-Ney (Chen & Goodman 1998, section 3), interpolated at every order:

    P(w | h) = (c(hw) - D(c(hw))) / c(h)  +  gamma(h) P(w | h')
    gamma(h) = (D_1 N_1(h) + D_2 N_2(h) + D_3+ N_3+(h)) / c(h)

with plain counts at the highest order, continuation counts (how many different bytes precede) below
it, and 1/256 underneath the unigram. h' drops the oldest byte. A document begins behind four BOS.

An n-gram is one integer, nine bits a symbol, so counting is sorting and looking up is binary
search: no dictionary. Modified rather than plain discounts: 2.085 against 2.096 bits per byte on
six novels after training on 19 MB of others, for two more counts per context. Surprising: all of
that text holds 414,339 different 5-grams, so the whole fit takes three seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

ORDER = 5
BOS = 256
_SYMBOL_BITS = 9  # 256 bytes and BOS


@dataclass(frozen=True)
class _Level:
    """One order n: its n-grams and its contexts of n-1 symbols, both sorted for binary search."""

    grams: np.ndarray  # (n_grams,) int64 keys
    discounted: np.ndarray  # (n_grams,) float64: (c - D(c)) / c(h)
    contexts: np.ndarray  # (n_contexts,) int64 keys
    gamma: np.ndarray  # (n_contexts,) float64: the mass left to the lower order


class ByteNgram:
    """Byte n-gram model; `fit` makes one, `nll` scores documents."""

    def __init__(self, levels: list[_Level]) -> None:
        self._levels = levels

    @classmethod
    def fit(cls, documents: Iterable[bytes], order: int = ORDER) -> "ByteNgram":
        """Counts and discounts.

        Args:
            documents: the training texts. 19 MB took 2.5 s and 0.6 GB.
            order: n, at most 7.

        Raises:
            ValueError: there is no text, or the order does not fit an integer key.
        """
        if not 1 <= order <= 7:
            raise ValueError(f"order={order} is not in 1..7: a key has 63 bits, 9 per byte")
        keys = [_keys(text, order) for text in documents]
        if not sum(map(len, keys)):
            raise ValueError("documents: 0 bytes of training text; nothing to count")
        grams, counts = np.unique(np.concatenate(keys), return_counts=True)
        del keys
        levels = []
        for n in range(order, 0, -1):
            levels.append(_level(grams, counts))
            if n > 1:
                # Distinct n-grams that share their last n-1 symbols: the continuation count.
                suffixes = grams & ((1 << _SYMBOL_BITS * (n - 1)) - 1)
                grams, counts = np.unique(suffixes, return_counts=True)
        return cls(levels[::-1])

    def nll(self, text: bytes) -> np.ndarray:
        """(n_bytes,) float64 nats of every byte of a document, the first one behind BOS."""
        return -np.log(self._probability(_keys(text, len(self._levels))))

    def distribution(self, context: bytes) -> np.ndarray:
        """(256,) float64: P(next byte | the document begins with `context`)."""
        history = np.concatenate(
            [np.full(len(self._levels), BOS), np.frombuffer(context, np.uint8)]
        )
        order = len(self._levels)
        key = 0
        for symbol in history[len(history) - (order - 1) :].tolist():
            key = key << _SYMBOL_BITS | symbol
        return self._probability((key << _SYMBOL_BITS) + np.arange(256))

    def _probability(self, keys: np.ndarray) -> np.ndarray:
        """P of the last symbol of each (order)-gram key given the others."""
        unique, inverse = np.unique(keys, return_inverse=True)
        p = np.full(len(unique), 1.0 / 256)
        for n, level in enumerate(self._levels, start=1):
            grams = unique & ((1 << _SYMBOL_BITS * n) - 1)
            gamma = _lookup(level.contexts, level.gamma, grams >> _SYMBOL_BITS, missing=1.0)
            p = _lookup(level.grams, level.discounted, grams, missing=0.0) + gamma * p
        return p[inverse]


def _keys(text: bytes, order: int) -> np.ndarray:
    """(n_bytes,) int64: the n-gram that ends at each byte."""
    symbols = np.frombuffer(text, np.uint8).astype(np.int64)
    padded = np.concatenate([np.full(order - 1, BOS, np.int64), symbols])
    keys = np.zeros(len(symbols), np.int64)
    for k in range(order):
        keys <<= _SYMBOL_BITS
        keys |= padded[k : k + len(symbols)]
    return keys


def _level(grams: np.ndarray, counts: np.ndarray) -> _Level:
    """Discounts one order's counts; `grams` sorted, so a context's n-grams are one run."""
    discounts = _discounts(counts)
    discount = discounts[np.minimum(counts, 3)]
    contexts, starts = np.unique(grams >> _SYMBOL_BITS, return_index=True)
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    gamma = np.add.reduceat(discount, starts) / totals
    repeats = np.diff(np.append(starts, len(grams)))
    return _Level(grams, (counts - discount) / np.repeat(totals, repeats), contexts, gamma)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """(4,): D for counts 0, 1, 2 and 3+, from the counts of counts.

    Where those are too few for the estimate (unigrams have 256 of them), absolute discounting by
    one half; any discount between 0 and the count leaves a proper distribution.
    """
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    fallback = np.array([0.0, 0.5, 0.5, 0.5])
    if min(n1, n2, n3, n4) == 0:
        return fallback
    y = n1 / (n1 + 2 * n2)
    estimate = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    inside = (estimate[1:] > 0) & (estimate[1:] < [1, 2, 3])
    return estimate if inside.all() else fallback


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, missing: float) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)
