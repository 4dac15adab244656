"""Which tokens a step sees: pure functions of (lengths, seed, step), never iterators.

Two orders over one format. *windows*: sample j is window pi(j mod n) of epoch j div n, with pi a
keyed Feistel permutation: nothing is stored, any rank computes any sample. *lanes*: each of G lanes
reads one document to its end and then takes the next one in permuted order; the schedule follows
from the lengths by walking a heap of lane positions, as far as training has come.

World size, gradient accumulation and worker counts do not appear here at all.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

FEISTEL_ROUNDS = 6
_MASK = 2**64 - 1
# A place in a lane as one integer: slot first, to be free soonest; or lane first, to be looked up.
LANE_BITS, SLOT_BITS = 20, 43
DEALT_AT_ONCE = 16384  # documents


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """pi(index) for a pseudo-random permutation pi of range(n), chosen by `key`.

    A Feistel network over a grid of a columns and b rows, a*b >= n: each round shifts one
    coordinate by a hash of the other, which is a bijection for any a and b. Results >= n walk on
    along their cycle until they are inside; the grid is so tight (a*b - n < a) that few must.

    Args:
        index: values in [0, n), any shape.
        n: size of the set.
        key: 64-bit integer, e.g. `mix(seed, epoch)`.

    Returns:
        int64, the shape of `index`.
    """
    columns = max(1, int(np.ceil(np.sqrt(n))))
    rows = max(1, -(-n // columns))
    keys = [np.uint64(mix(key, i)) for i in range(FEISTEL_ROUNDS)]
    out = np.asarray(index, np.uint64).copy()
    outside = np.ones(out.shape, bool)
    while outside.any():
        x, y = np.divmod(out[outside], np.uint64(rows))
        for i in range(0, FEISTEL_ROUNDS, 2):
            x = (x + hash64(y ^ keys[i]) % np.uint64(columns)) % np.uint64(columns)
            y = (y + hash64(x ^ keys[i + 1]) % np.uint64(rows)) % np.uint64(rows)
        out[outside] = x * np.uint64(rows) + y
        outside = out >= n
    return out.astype(np.int64)


def mix(*values: int) -> int:
    """A 64-bit hash of some integers (splitmix64 absorbed one after another)."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = hash64(state ^ np.uint64(value & _MASK))
    return int(state[0])


def hash64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea, Flood 2014), elementwise; wraps modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def check_identity(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Compares what identifies the order of a checkpoint with what does now.

    Raises:
        ValueError: naming each difference.
    """
    differences = [
        f"{key}: saved {saved.get(key)}, now {value}"
        for key, value in ours.items()
        if saved.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"data order of the checkpoint differs: {'; '.join(differences)}. Resuming would "
            "repeat and skip data: restore these settings, or start a run under another name"
        )


class EpochOrder:
    """n items, shuffled anew in every epoch; epochs follow each other without a gap.

    Args:
        n: items of an epoch.
        seed: chooses the order.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed

    def items(self, ordinals: np.ndarray) -> np.ndarray:
        """The items at some places of the endless order, both (m,) int64."""
        epochs, places = np.divmod(ordinals, self.n)
        out = np.empty(ordinals.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = permute(places[here], self.n, mix(self.seed, epoch))
        return out


class DocumentTable(NamedTuple):
    """Where documents begin, m of them, sorted; a lane's first one begins at its slot 0.

    Attributes:
        places: (m,) int64, lane << SLOT_BITS | slot.
        documents: (m,) int64.
    """

    places: np.ndarray
    documents: np.ndarray

    def find(
        self, lanes: np.ndarray, first: np.ndarray, length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents that touch slots [first[i], first[i] + length) of lanes[i], for each row i.

        A document reaches, with the padding behind it, to the next one of its lane.

        Returns:
            Row, document, and the slot where it begins counted from the row's first; by row, slot.
        """
        places = lanes << SLOT_BITS | first
        before = self.places.searchsorted(places, "right") - 1
        rows, found = expand(before, self.places.searchsorted(places + length) - before)
        return rows, self.documents[found], self.places[found] - places[rows]


def expand(first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges [first[i], first[i] + counts[i]): the i of each, and itself."""
    rows = np.repeat(np.arange(len(first)), counts)
    return rows, np.arange(len(rows)) + (first - np.cumsum(counts) + counts)[rows]


def padded_slots(doc_lengths: np.ndarray, grid: int) -> np.ndarray:
    """Slots that documents take: BOS, their tokens, padding to the next multiple of `grid`."""
    return -(-(doc_lengths + 1) // grid) * grid


class LaneOrder:
    """The schedule of documents in lanes, dealt as far as it is asked for.

    A lane is a row of slots; a document takes the `padded_slots` of its length. Each lane belongs
    to a corpus, whose next document goes to the one of its lanes that is free first. A lane that
    changes hands still reads its document to the end.

    Args:
        doc_lengths: of each corpus (n,) tokens per document, EOS included.
        owners: (first slot, (n_lanes,) index of the corpus), from slot 0 on, ascending.
        grid: document starts are multiples of it.
        seeds: of each corpus, choosing its order.
    """

    def __init__(
        self,
        doc_lengths: Sequence[np.ndarray],
        owners: Sequence[tuple[int, np.ndarray]],
        grid: int,
        seeds: Sequence[int],
    ) -> None:
        self._dealers = [
            _Dealer(lengths, grid, seed) for lengths, seed in zip(doc_lengths, seeds, strict=True)
        ]
        self._bases = np.cumsum([0, *map(len, doc_lengths)]).tolist()
        self._phases = list(owners)
        n_lanes = len(owners[0][1])
        self._hand_out(list(range(n_lanes)))
        # Dealing a few documents at a time would sort the table again and again.
        slots = sum(dealer.mean_slots * min(DEALT_AT_ONCE, dealer.n) for dealer in self._dealers)
        self._ahead = int(slots) // n_lanes
        self._horizon = 0  # Every lane has its documents up to here.
        self._table = _join([])

    def table(self, slot: int) -> DocumentTable:
        """The schedule, complete before `slot`; documents are numbered over all corpora."""
        while self._horizon < slot:
            self._horizon = slot + self._horizon // 4 + self._ahead
            if self._phases:
                self._horizon = min(self._horizon, self._phases[0][0])
            parts = [self._table]
            for base, dealer in zip(self._bases, self._dealers, strict=False):
                part = dealer.deal(self._horizon)
                parts.append(part._replace(documents=part.documents + base))
            joined = _join(parts)
            order = np.argsort(joined.places, kind="stable")
            self._table = DocumentTable(joined.places[order], joined.documents[order])
            if self._phases and self._horizon == self._phases[0][0]:
                self._hand_out([place for dealer in self._dealers for place in dealer.free])
        return self._table

    def epochs(self, slot: int) -> list[int]:
        """Of each corpus the epochs whose first documents begin before `slot`, less one, or 0."""
        self.table(slot)
        return [max(0, bisect_left(dealer.epoch_starts, slot) - 1) for dealer in self._dealers]

    def _hand_out(self, free: list[int]) -> None:
        """Gives every lane to the corpus that owns it from now on."""
        owners = self._phases.pop(0)[1].tolist()
        for dealer in self._dealers:
            dealer.free = []
        for place in sorted(free):  # A sorted list is a heap.
            self._dealers[owners[place & (2**LANE_BITS - 1)]].free.append(place)


class _Dealer:
    """Deals the documents of one corpus, in its order, to the lanes in `free`.

    `free` is a heap of slot << LANE_BITS | lane: where each lane has room for its next document.
    """

    def __init__(self, doc_lengths: np.ndarray, grid: int, seed: int) -> None:
        self.lengths, self.grid, self.n = doc_lengths, grid, len(doc_lengths)
        self.mean_slots = float(doc_lengths.mean()) + 1
        self.order = EpochOrder(self.n, seed)
        self.free: list[int] = []
        self.dealt = 0
        self.epoch_starts: list[int] = []  # The slot at which the epoch's first document begins.

    def deal(self, slot: int) -> DocumentTable:
        """Deals until every lane is filled up to `slot`; in the order of dealing, not sorted."""
        limit, free = slot << LANE_BITS, self.free
        dealt: list[DocumentTable] = []
        while free and free[0] < limit:
            ordinals = np.arange(self.dealt, self.dealt + min(DEALT_AT_ONCE, self.n))
            documents = self.order.items(ordinals)
            sizes = (padded_slots(self.lengths[documents], self.grid) << LANE_BITS).tolist()
            taken: list[int] = []
            for size in sizes:
                place = free[0]
                if place >= limit:
                    break
                taken.append(heapq.heapreplace(free, place + size))
            places = np.array(taken)
            slots, lanes = places >> LANE_BITS, places & (2**LANE_BITS - 1)
            new_epoch = ordinals[: len(places)] % self.n == 0
            self.epoch_starts += slots[new_epoch].tolist()
            self.dealt += len(places)
            dealt.append(DocumentTable(lanes << SLOT_BITS | slots, documents[: len(places)]))
        return _join(dealt)


def _join(parts: list[DocumentTable]) -> DocumentTable:
    empty = np.zeros(0, np.int64)
    return DocumentTable(
        np.concatenate([empty, *(part.places for part in parts)]),
        np.concatenate([empty, *(part.documents for part in parts)]),
    )
