"""Labelled byte sequences of any lengths, in three arrays; and their folder on disk.

Shapes: n examples of P sequences each (1, or 2 for Retrieval), N symbols in all.
"""

from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Examples(NamedTuple):
    """Sequence s is symbols[offsets[s] : offsets[s + 1]]; those of one example are neighbours.

    symbols: (N,) uint8. offsets: (n P + 1,) int64. labels: (n,) int64.
    """

    symbols: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[bytes], labels: Sequence[int]) -> "Examples":
        """From byte strings, P per label."""
        offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        symbols = np.frombuffer(b"".join(sequences), np.uint8)
        return cls(symbols, offsets, np.asarray(labels, np.int64))

    @classmethod
    def join(cls, parts: Sequence["Examples"]) -> "Examples":
        ends = np.cumsum([0, *(part.offsets[-1] for part in parts)])
        shifted = [part.offsets[:-1] + end for part, end in zip(parts, ends, strict=False)]
        return cls(
            np.concatenate([part.symbols for part in parts]),
            np.concatenate([*shifted, ends[-1:]]),
            np.concatenate([part.labels for part in parts]),
        )

    @property
    def per_example(self) -> int:
        """P."""
        return (len(self.offsets) - 1) // max(1, len(self.labels))

    def first(self, n: int) -> "Examples":
        end = self.offsets[n * self.per_example]
        return Examples(
            self.symbols[:end], self.offsets[: n * self.per_example + 1], self.labels[:n]
        )

    def lengths(self) -> np.ndarray:
        """(n,) int64: of the longest sequence of each example."""
        return np.diff(self.offsets).reshape(-1, self.per_example).max(1)

    def sequence(self, index: int) -> np.ndarray:
        """(length,) uint8."""
        return self.symbols[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples of these indices, in their order."""
        p = self.per_example
        chosen = [self.sequence(p * i + k) for i in indices for k in range(p)]
        offsets = np.cumsum([0, *map(len, chosen)], dtype=np.int64)
        return Examples(np.concatenate(chosen), offsets, self.labels[indices])

    def padded(self, row_lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of equal length, zeros behind each sequence.

        Args:
            row_lengths: in increasing order; the first that holds the longest sequence is taken.

        Returns:
            (n P, T) uint8 and the lengths, (n P,) int64.
        """
        lengths = np.diff(self.offsets)
        width = row_lengths[bisect_left(row_lengths, lengths.max())]
        rows = np.zeros((len(lengths), width), np.uint8)
        rows[np.arange(width) < lengths[:, None]] = self.symbols
        return rows, lengths

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in self._asdict().items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> "Examples":
        """What `save` wrote; symbols stay on disk until they are read."""
        return cls(
            np.load(folder / "symbols.npy", mmap_mode="r"),
            np.load(folder / "offsets.npy"),
            np.load(folder / "labels.npy"),
        )
