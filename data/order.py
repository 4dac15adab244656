"""Which tokens a step sees: pure functions of (lengths, seed, step), never iterators.

Two orders over one format. *windows*: sample j is window pi(j mod n) of epoch j div n, with pi a
keyed Feistel permutation: nothing is stored, any rank computes any sample. *lanes*: each of G lanes
reads one document to its end and then takes the next one in permuted order; the whole schedule
follows from the lengths by walking a heap of lane positions (30,000 books, 256 lanes: ~30 ms).

World size, gradient accumulation and worker counts do not appear here at all.
"""

import heapq
from bisect import bisect_right

import numpy as np

FEISTEL_ROUNDS = 6
_MASK = 2**64 - 1


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
            x = (x + _hash(y ^ keys[i]) % np.uint64(columns)) % np.uint64(columns)
            y = (y + _hash(x ^ keys[i + 1]) % np.uint64(rows)) % np.uint64(rows)
        out[outside] = x * np.uint64(rows) + y
        outside = out >= n
    return out.astype(np.int64)


def mix(*values: int) -> int:
    """A 64-bit hash of some integers (splitmix64 absorbed one after another)."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = _hash(state ^ np.uint64(value & _MASK))
    return int(state[0])


def _hash(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea, Flood 2014), elementwise; wraps modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class WindowOrder:
    """Shuffled windows over a stream of tokens; epochs follow each other without a gap.

    Args:
        n_tokens: tokens of the split.
        seq_len: targets per window; the last window of the stream may have fewer.
        seed: chooses the order.
    """

    def __init__(self, n_tokens: int, seq_len: int, seed: int) -> None:
        self.n_windows = -(-n_tokens // seq_len)
        self.seed = seed

    def windows(self, first: int, count: int) -> np.ndarray:
        """Windows of samples [first, first + count), counted over all epochs, (count,) int64."""
        sample = np.arange(first, first + count)
        epochs = sample // self.n_windows
        out = np.empty(count, np.int64)
        for epoch in range(first // self.n_windows, int(epochs[-1]) + 1 if count else 0):
            here = epochs == epoch
            out[here] = permute(
                sample[here] % self.n_windows, self.n_windows, mix(self.seed, epoch)
            )
        return out

    def epoch(self, sample: int) -> int:
        """The epoch that sample `sample` belongs to."""
        return sample // self.n_windows


class LaneOrder:
    """The schedule of documents in lanes, built epoch by epoch as far as it is asked for.

    A lane is a row of slots. A document of L tokens (EOS included) takes a slot for BOS, L slots
    for its tokens, and padding up to the next multiple of `grid`, where the lane's next one begins.

    Args:
        doc_lengths: (n,) tokens per document, EOS included.
        n_lanes: lanes; the global batch size.
        grid: document starts are multiples of it.
        seed: chooses the order.
    """

    def __init__(self, doc_lengths: np.ndarray, n_lanes: int, grid: int, seed: int) -> None:
        self.lengths: list[int] = doc_lengths.tolist()
        self.slots: list[int] = (-(-(doc_lengths + 1) // grid) * grid).tolist()
        self.seed = seed
        self._free = [(0, lane) for lane in range(n_lanes)]  # a heap: (first free slot, lane)
        self._starts: list[list[int]] = [[] for _ in range(n_lanes)]
        self._documents: list[list[int]] = [[] for _ in range(n_lanes)]
        self._epoch_starts: list[int] = []  # The slot at which the epoch's first document begins.

    def segment(self, lane: int, start: int, stop: int) -> list[tuple[int, int]]:
        """(document, slot of its BOS) of all that touch slots [start, stop) of a lane, in order."""
        self._extend(stop)
        starts, documents = self._starts[lane], self._documents[lane]
        out = []
        for i in range(bisect_right(starts, start) - 1, len(starts)):
            if starts[i] >= stop:
                break
            out.append((documents[i], starts[i]))
        return out

    def epoch(self, slot: int) -> int:
        """How many epochs' first documents begin before `slot`, less one; 0 at the start."""
        self._extend(slot)
        return max(0, bisect_right(self._epoch_starts, slot - 1) - 1)

    def _extend(self, slot: int) -> None:
        """Schedules whole epochs until every lane is filled up to `slot`."""
        while self._free[0][0] < slot:
            epoch = len(self._epoch_starts)
            self._epoch_starts.append(self._free[0][0])
            n = len(self.lengths)
            for document in permute(np.arange(n), n, mix(self.seed, epoch)).tolist():
                start, lane = self._free[0]
                heapq.heapreplace(self._free, (start + self.slots[document], lane))
                self._starts[lane].append(start)
                self._documents[lane].append(document)
