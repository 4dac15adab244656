"""The order of examples in training: by seed alone, with few pads, and at any place at once."""

from collections.abc import Iterator

import numpy as np

POOL = 32  # batches whose examples are sorted by length


def batches(lengths: np.ndarray, batch_size: int, seed: int, skip: int = 0) -> Iterator[np.ndarray]:
    """Rows of batch after batch, for ever; each epoch is a permutation of its own without the
    incomplete last batch.

    Of `POOL` batches at a time the longest examples go into one batch and the shortest into
    another, and these come in any order.

    Args:
        lengths: (n,) tokens of the examples.
        batch_size: examples per batch.
        seed: of the permutations.
        skip: batches that have been seen.

    Raises:
        ValueError: fewer examples than a batch.
    """
    n = len(lengths)
    per_epoch = n // batch_size
    if per_epoch == 0:
        raise ValueError(f"batch_size={batch_size} is more than the {n} training examples")
    epoch, first = divmod(skip, per_epoch)
    while True:
        rng = np.random.default_rng([seed, epoch])
        shuffled = rng.permutation(n)[: per_epoch * batch_size]
        rows: list[np.ndarray] = []
        for start in range(0, len(shuffled), POOL * batch_size):
            pool = shuffled[start : start + POOL * batch_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            rows += list(rng.permutation(pool.reshape(-1, batch_size)))
        yield from rows[first:]
        epoch, first = epoch + 1, 0


def micro_batches(lengths: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Positions in a batch in parts of at most `tokens` with their pads; a longer example is alone.

    Args:
        lengths: (n,) tokens of the batch's examples.
        tokens: of a part, pads counted.
    """
    parts: list[list[int]] = []
    for position in np.argsort(-lengths, kind="stable").tolist():
        if not parts or (len(parts[-1]) + 1) * int(lengths[parts[-1][0]]) > tokens:
            parts.append([])
        parts[-1].append(position)
    return [np.array(part) for part in parts]
