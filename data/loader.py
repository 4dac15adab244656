"""Batches from a corpus: `batch = f(fingerprint, seed, step)`, copied out of memory-mapped shards.

Lane (or sample) g of a global batch of G belongs to rank g*W//G of W; within a rank, micro-batch m
holds the m-th run of `micro_batch_size` lanes. Shapes: B rows, T seq_len, n grid edges.

In lanes a document begins with BOS and ends with EOS; in windows one BOS stands before the whole
stream. Either way every token of every document, the first and EOS too, is a target exactly once
per epoch, and no other token is ever a target.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.order import LaneOrder, WindowOrder
from data.shards import Corpus
from data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from pretrain.batch import Batch

STATE_FORMAT = 1
BOUNDARIES = {"lanes": "pad_block", "windows": "packed"}
START_ID = {"lanes": BOS_ID, "windows": EOS_ID}
"""What a model sees before a document's first token: in windows the EOS of the one before it, save
for a single BOS per epoch. Whoever evaluates a model puts the same token there."""
ORDER_BLOCK = 4096  # Samples whose order is computed at once: the permutation is vectorised.


def build_loader(
    corpus: Corpus,
    *,
    mode: str,
    seq_len: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    reset_grid: int = 1,
    boundary: str | None = None,
    prefetch_steps: int = 2,
) -> "Loader":
    """The loader of one rank. Its order depends on neither `world_size` nor `micro_batch_size`.

    Args:
        corpus: an opened split.
        mode: "lanes" (documents stay contiguous in their lane) or "windows" (shuffled).
        seq_len: T, targets per row.
        global_batch_size: rows of one optimizer step over all ranks; the number of lanes.
        micro_batch_size: rows of one forward on one rank.
        rank: data-parallel rank; ranks of one sequence-parallel group share theirs.
        world_size: data-parallel size.
        seed: chooses the order.
        reset_grid: lanes only: documents start at multiples of it.
        boundary: "pad_block" for lanes, "packed" for windows; None takes the fitting one.
        prefetch_steps: steps read ahead by a thread; 0 reads in the caller's.

    Raises:
        ValueError: listing every argument that does not fit, with the nearest values that do.
    """
    problems = []
    if mode not in BOUNDARIES:
        problems.append(f"mode={mode}: must be one of {', '.join(BOUNDARIES)}")
    elif boundary not in (None, BOUNDARIES[mode]):
        problems.append(f"boundary={boundary} with mode={mode}: use boundary={BOUNDARIES[mode]}")
    unit = micro_batch_size * world_size
    if global_batch_size <= 0 or global_batch_size % unit:
        problems.append(
            f"global_batch_size={global_batch_size}: not a multiple of micro_batch_size*world_size "
            f"= {micro_batch_size}*{world_size} = {unit}; {_nearest(global_batch_size, unit)}"
        )
    if mode == "lanes" and (seq_len <= 0 or seq_len % reset_grid):
        problems.append(
            f"seq_len={seq_len}: not a multiple of the model's reset grid {reset_grid}, on which "
            f"documents start; {_nearest(seq_len, reset_grid)}"
        )
    if corpus.n_tokens == 0:
        problems.append(f"corpus {corpus.path}: split {corpus.split} has no tokens; choose another")
    if problems:
        raise ValueError("; ".join(problems))
    assert 0 <= rank < world_size
    reader: _Reader
    if mode == "lanes":
        reader = _LaneReader(corpus, seq_len, global_batch_size, reset_grid, seed)
    else:
        reader = _WindowReader(corpus, seq_len, global_batch_size, seed)
    rows_per_rank = global_batch_size // world_size
    identity = {
        "format": STATE_FORMAT,
        "fingerprint": corpus.fingerprint,
        "split": corpus.split,
        "mode": mode,
        "boundary": BOUNDARIES[mode],
        "seed": seed,
        "lanes": global_batch_size,
        "seq_len": seq_len,
        "reset_grid": reset_grid if mode == "lanes" else 1,
    }
    rows = range(rank * rows_per_rank, (rank + 1) * rows_per_rank)
    return Loader(reader, rows, micro_batch_size, identity, prefetch_steps)


class Loader:
    """A `pretrain.batch.StepLoader`: holds no position, every method takes the step."""

    def __init__(
        self,
        reader: "_Reader",
        rows: range,
        micro_batch_size: int,
        identity: dict[str, Any],
        prefetch_steps: int,
    ) -> None:
        self._reader = reader
        self._rows = rows
        self._micro_batch_size = micro_batch_size
        self._identity = identity
        self._prefetch_steps = prefetch_steps
        self._lock = threading.Lock()  # `state` may be asked for while the thread reads ahead.

    def steps(self, start_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of step `start_step`, `start_step + 1`, ... for ever."""
        if self._prefetch_steps:
            return _prefetched(self.step, start_step, self._prefetch_steps)
        return map(self.step, itertools.count(start_step))

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step."""
        with self._lock:
            tokens, doc_id, resets = self._reader.read(step, self._rows)
        # BOS and padding are no targets. In lanes one of the two stands behind every EOS.
        loss_mask = (doc_id[:, 1:] >= 0) & (tokens[:, 1:] != BOS_ID)
        size = self._micro_batch_size
        parts = [
            torch.split(_tensor(array), size)
            if array is not None
            else [None] * (len(tokens) // size)
            for array in (tokens, loss_mask, resets, doc_id)
        ]
        return [Batch(*micro_batch) for micro_batch in zip(*parts, strict=True)]

    def state(self, step: int) -> dict[str, Any]:
        """The position after `step` steps: the order's identity and a few integers, JSON-able."""
        with self._lock:
            epoch = self._reader.epoch(step)
        consumed = step * self._identity["lanes"] * self._identity["seq_len"]
        return {**self._identity, "step": step, "epoch": epoch, "tokens_consumed": consumed}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Compares a saved position with what this loader would have saved.

        Raises:
            ValueError: naming each difference.
        """
        ours = self.state(int(saved.get("step", 0)))
        differences = [
            f"{key}: saved {saved.get(key)}, now {ours.get(key)}"
            for key in sorted({*ours, *saved})
            if saved.get(key) != ours.get(key)
        ]
        if differences:
            raise ValueError(
                f"data order of the checkpoint differs: {'; '.join(differences)}. Resuming would "
                "repeat and skip data: restore these settings, or start a run under another name"
            )


class _Reader(Protocol):
    """Knows one order. `read` gives tokens (B, T+1), doc_id (B, T+1) and resets (B, n) or None."""

    def read(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]: ...

    def epoch(self, step: int) -> int: ...


class _WindowReader:
    def __init__(self, corpus: Corpus, seq_len: int, n_rows: int, seed: int) -> None:
        self.corpus, self.seq_len, self.n_rows = corpus, seq_len, n_rows
        self.order = WindowOrder(corpus.n_tokens, seq_len, seed)
        self._known, self._known_from = np.zeros(0, np.int64), 0

    def read(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray, None]:
        tokens = np.empty((len(rows), self.seq_len + 1), np.int64)
        doc_id = np.empty_like(tokens)
        windows = self._windows(step * self.n_rows + rows.start, len(rows))
        for row, window in enumerate(windows.tolist()):
            # The stream is BOS and then the split's tokens, so its slot i + 1 is token i.
            start = window * self.seq_len - 1
            stop = min(start + self.seq_len + 1, self.corpus.n_tokens)
            if start < 0:
                tokens[row, 0], doc_id[row, 0] = BOS_ID, 0
            skip = max(0, -start)
            here = slice(skip, stop - start)
            self.corpus.read(start + skip, stop, tokens[row, here], doc_id[row, here])
            _pad(tokens[row], doc_id[row], stop - start, self.seq_len + 1)
        return tokens, doc_id, None

    def epoch(self, step: int) -> int:
        return self.order.epoch(step * self.n_rows)

    def _windows(self, first: int, count: int) -> np.ndarray:
        behind = self._known_from + len(self._known)
        if not (self._known_from <= first and first + count <= behind):
            self._known = self.order.windows(first, max(count, ORDER_BLOCK))
            self._known_from = first
        return self._known[first - self._known_from :][:count]


class _LaneReader:
    def __init__(self, corpus: Corpus, seq_len: int, n_rows: int, grid: int, seed: int) -> None:
        self.corpus, self.seq_len, self.grid = corpus, seq_len, grid
        self.order = LaneOrder(corpus.doc_lengths, n_rows, grid, seed)

    def read(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.empty((len(rows), self.seq_len + 1), np.int64)
        doc_id = np.empty_like(tokens)
        resets = np.zeros((len(rows), self.seq_len // self.grid), bool)
        first, last = step * self.seq_len, (step + 1) * self.seq_len
        for row, lane in enumerate(rows):
            filled = 0
            for document, bos in self.order.segment(lane, first, last + 1):
                ids = self.corpus.document(document)
                at = bos - first  # Where BOS falls in this row; negative: in an earlier segment.
                begin, end = max(at + 1, 0), min(at + 1 + len(ids), self.seq_len + 1)
                if at >= 0:
                    _pad(tokens[row], doc_id[row], filled, at)
                    tokens[row, at] = BOS_ID
                    if at < self.seq_len:
                        resets[row, at // self.grid] = True
                if end > begin:
                    tokens[row, begin:end] = ids[begin - at - 1 : end - at - 1]
                filled = max(begin, end)
                doc_id[row, max(at, 0) : filled] = document
            if filled <= self.seq_len:
                _pad(tokens[row], doc_id[row], filled, self.seq_len + 1)
        return tokens, doc_id, resets

    def epoch(self, step: int) -> int:
        return self.order.epoch(step * self.seq_len)


def _pad(tokens: np.ndarray, doc_id: np.ndarray, start: int, stop: int) -> None:
    tokens[start:stop], doc_id[start:stop] = PAD_ID, -1


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    # Only pinned memory is copied to the device while it computes.
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _prefetched(
    make: Callable[[int], list[Batch]], start_step: int, depth: int
) -> Iterator[list[Batch]]:
    """make(start_step), make(start_step + 1), ... with `depth` of them made ahead by a thread."""
    ready: queue.Queue[list[Batch] | Exception] = queue.Queue(depth)
    stopped = threading.Event()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def offer(item: list[Batch] | Exception) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        if device is not None:  # A new thread starts on device 0 and would pin memory for it.
            torch.cuda.set_device(device)
        step = start_step
        try:
            while not stopped.is_set():
                offer(make(step))
                step += 1
        except Exception as error:
            offer(error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return "nearest: " + " or ".join(str(n) for n in (below, below + unit) if n > 0)
