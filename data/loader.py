"""Batches from corpora: `batch = f(fingerprints, seed, step)`, copied out of memory-mapped shards.

Lane (or sample) g of a global batch of G belongs to rank g*W//G of W; within a rank, micro-batch m
holds the m-th run of `micro_batch_size` lanes. Shapes: B rows, T seq_len, n grid edges.

With sequence parallelism a group of S neighbouring ranks takes the place of a rank: they get the
same rows, and of each the T/S targets that are theirs. Rank i of the group gets the T/S + 1 slots
from i*T/S on, so that the last token of one is the first one of the next, as it is for segments;
joined, they are the rows that one rank would get. Only these slots are read.

Where documents are set apart a document begins with BOS and ends with EOS; in packed windows one
BOS stands before the whole stream. Either way every token of every document, the first and EOS too,
is a target exactly once per epoch, and no other token is ever a target.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from data.mixture import Mixture, WindowMixture, lane_owners
from data.order import SLOT_BITS, DocumentTable, LaneOrder, check_identity, padded_slots
from data.rows import Layout, Shape, Shelf, document_layout, packed_layout
from data.shards import Corpus
from data.tokenizer import BOS_ID, EOS_ID
from pretrain.batch import Batch

STATE_FORMAT = 1
Step = TypeVar("Step")  # What a loader yields for a step.
BOUNDARIES = {
    "lanes": ("pad_block", "pad_segment", "cross"),
    "windows": ("packed", "pad_block"),
}
"""What may stand between two documents; the first of a mode is its default.

pad_block: padding up to the next edge of the model's reset grid, and a reset there. pad_segment:
padding up to the next segment, and a reset. cross, packed: nothing, and no reset: the model reads
on over the boundary."""
LAYOUT_TOKENS, LAYOUT_STEPS = 2**22, 256  # Laid out at once, at most.


def start_id(mode: str, boundary: str = "") -> int:
    """What a model sees before a document's first token: BOS, or in packed windows the EOS of the
    document before it, save for a single BOS per epoch (in a stream: per run). Evaluation puts the
    same token there."""
    packed = mode == "stream" or (boundary or BOUNDARIES[mode][0]) == "packed"
    return EOS_ID if packed else BOS_ID


def build_loader(
    data: Corpus | Mixture,
    *,
    mode: str,
    seq_len: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    sequence_parallel_size: int = 1,
    seed: int = 0,
    reset_grid: int = 1,
    boundary: str = "",
    prefetch_steps: int = 2,
    threads: int = 1,
) -> "Loader":
    """The loader of one rank. Its order depends on neither `world_size` nor `micro_batch_size`.

    Args:
        data: an opened split, or several with weights.
        mode: "lanes" (documents stay contiguous in their lane) or "windows" (shuffled).
        seq_len: T, targets per row.
        global_batch_size: rows of one optimizer step over all ranks; the number of lanes.
        micro_batch_size: rows of one forward on one rank.
        rank: of this process.
        world_size: processes.
        sequence_parallel_size: S, neighbouring ranks that share the same rows, each its part of
            them; of the `world_size // sequence_parallel_size` groups each has its own rows.
        seed: chooses the order.
        reset_grid: where documents are set apart, they start at multiples of it.
        boundary: of `BOUNDARIES[mode]`; "" takes the first.
        prefetch_steps: steps read ahead by threads; 0 reads in the caller's.
        threads: how many; each reads whole steps.

    Raises:
        ValueError: listing every argument that does not fit, with the nearest values that do.
    """
    problems = []
    boundary = boundary or BOUNDARIES.get(mode, ("",))[0]
    if mode not in BOUNDARIES:
        problems.append(f"mode={mode}: must be one of {', '.join(BOUNDARIES)}")
    elif boundary not in BOUNDARIES[mode]:
        problems.append(
            f"boundary={boundary} with mode={mode}: use boundary={' or '.join(BOUNDARIES[mode])}"
        )
        boundary = BOUNDARIES[mode][0]
    groups = world_size // sequence_parallel_size
    if groups * sequence_parallel_size != world_size:
        problems.append(
            f"world_size={world_size}: not a multiple of sequence_parallel_size="
            f"{sequence_parallel_size}; {_nearest(world_size, sequence_parallel_size)}"
        )
    unit = micro_batch_size * max(groups, 1)
    if global_batch_size <= 0 or global_batch_size % unit:
        problems.append(
            f"global_batch_size={global_batch_size}: not a multiple of micro_batch_size*world_size "
            f"= {micro_batch_size}*{groups} = {unit}; {_nearest(global_batch_size, unit)}"
        )
    grid = reset_grid if boundary in ("pad_block", "pad_segment") else 0
    if seq_len <= 0 or (grid and seq_len % grid):
        problems.append(
            f"seq_len={seq_len}: not a multiple of the model's reset grid {reset_grid}, on which "
            f"documents start; {_nearest(seq_len, reset_grid)}"
        )
    elif seq_len % (part := max(grid, 1) * sequence_parallel_size):
        problems.append(
            f"seq_len={seq_len}: sequence_parallel_size={sequence_parallel_size} ranks cannot get "
            f"equal parts in multiples of {max(grid, 1)}; {_nearest(seq_len, part)}"
        )
    if problems:
        raise ValueError("; ".join(problems))
    assert 0 <= rank < world_size
    mixture = data if isinstance(data, Mixture) else Mixture.of(data)
    reader: _Reader
    if mode == "lanes":
        steps_of = {"pad_block": grid, "pad_segment": seq_len, "cross": 1}
        reader = _Lanes(mixture, seq_len, global_batch_size, grid, steps_of[boundary], seed)
    elif boundary == "packed":
        reader = _PackedWindows(mixture, seq_len, global_batch_size, seed)
    else:
        reader = _PaddedWindows(mixture, seq_len, global_batch_size, grid, seed)
    identity = {
        "format": STATE_FORMAT,
        **mixture.identity(),
        "mode": mode,
        "boundary": boundary,
        "seed": seed,
        "lanes": global_batch_size,
        "seq_len": seq_len,
        "reset_grid": max(grid, 1),
    }
    group, place = divmod(rank, sequence_parallel_size)
    rows = _part(global_batch_size, group, groups)
    columns = _part(seq_len, place, sequence_parallel_size)
    return Loader(reader, rows, columns, micro_batch_size, identity, prefetch_steps, threads)


class Loader:
    """A `pretrain.batch.StepLoader`: holds no position, every method takes the step."""

    def __init__(
        self,
        reader: "_Reader",
        rows: range,
        columns: range,
        micro_batch_size: int,
        identity: dict[str, Any],
        prefetch_steps: int,
        threads: int,
    ) -> None:
        self._reader = reader
        self._rows = rows
        self._columns = columns  # Of the targets of a row; their inputs begin one slot before.
        self._micro_batch_size = micro_batch_size
        self._identity = identity
        self._prefetch_steps = prefetch_steps
        self._threads = threads
        # Only pinned memory is copied to the device while it computes; it is filled in place.
        self._pin_memory = torch.cuda.is_available()
        fitting = LAYOUT_TOKENS // (len(rows) * len(columns))
        self._layout_steps = max(1, min(LAYOUT_STEPS, fitting))
        self._layouts: dict[int, Layout] = {}  # The last two: threads may work on both.
        self._lock = threading.Lock()  # Layouts and schedules grow as they are asked for.

        # glibc hands freed memory back and gets it again page by page, which can take ten times as
        # long as filling it; only blocks as large as one it has freed before it keeps (mallopt(3),
        # M_MMAP_THRESHOLD: at most 32 MiB, counted with a header).
        np.empty(2**25 - 2**12, np.uint8)

    def steps(self, start_step: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of step `start_step`, `start_step + 1`, ... for ever."""
        if self._prefetch_steps:
            return prefetched(self.step, start_step, self._prefetch_steps, self._threads)
        return map(self.step, itertools.count(start_step))

    def step(self, step: int) -> list[Batch]:
        """This rank's micro-batches of one optimizer step."""
        n_rows, n_columns, grid = len(self._rows), len(self._columns), self._reader.grid
        empty = partial(torch.empty, pin_memory=self._pin_memory)
        tensors = Batch(
            empty(n_rows, n_columns + 1, dtype=torch.int64),
            empty(n_rows, n_columns, dtype=torch.bool),
            empty(n_rows, n_columns // grid, dtype=torch.bool) if grid else None,
            empty(n_rows, n_columns + 1, dtype=torch.int64),
        )
        number, place = divmod(step, self._layout_steps)
        self._layout(number).fill(
            place,
            tensors.tokens.numpy(),
            tensors.loss_mask.numpy(),
            None if tensors.resets is None else tensors.resets.numpy(),
            tensors.doc_id.numpy(),
        )
        size = self._micro_batch_size
        if size == n_rows:
            return [tensors]
        parts = [
            tensor.split(size) if tensor is not None else [None] * (n_rows // size)
            for tensor in tensors
        ]
        return [Batch(*micro_batch) for micro_batch in zip(*parts, strict=True)]

    def state(self, step: int) -> dict[str, Any]:
        """The position after `step` steps: the order's identity and a few integers, JSON-able."""
        with self._lock:
            epochs = self._reader.epochs(step)
        consumed = step * self._identity["lanes"] * self._identity["seq_len"]
        return {
            **self._identity,
            "step": step,
            "epoch": epochs if len(epochs) > 1 else epochs[0],
            "tokens_consumed": consumed,
        }

    def check_state(self, saved: dict[str, Any]) -> None:
        """Compares a saved position with what this loader would have saved.

        Raises:
            ValueError: naming each difference.
        """
        ours = self.state(int(saved.get("step", 0)))
        check_identity(saved, {**dict.fromkeys(saved), **ours})

    def _layout(self, number: int) -> Layout:
        """The layout of steps [number, number + 1) * self._layout_steps."""
        with self._lock:
            if number not in self._layouts:
                first = number * self._layout_steps
                steps = range(first, first + self._layout_steps)
                layout = self._reader.layout(steps, self._rows, self._columns)
                newest = dict(itertools.islice(reversed(self._layouts.items()), 1))
                self._layouts = {**newest, number: layout}
            return self._layouts[number]


class _Reader(Protocol):
    """Knows one order: what fills a part of the global batch, and where each corpus stands."""

    grid: int  # of resets; 0 for batches without

    def layout(self, steps: range, rows: range, columns: range) -> Layout: ...

    def epochs(self, step: int) -> list[int]: ...


class _PackedWindows:
    """Window w of a corpus is its tokens [w*T - 1, (w + 1)*T), with BOS as token -1."""

    grid = 0

    def __init__(self, mixture: Mixture, seq_len: int, n_rows: int, seed: int) -> None:
        self.seq_len, self.n_rows = seq_len, n_rows
        self.shelf = Shelf(mixture.corpora)
        n_windows = [-(-corpus.n_tokens // seq_len) for corpus in mixture.corpora]
        self.order = WindowMixture(mixture, n_windows, seq_len, seed)

    def layout(self, steps: range, rows: range, columns: range) -> Layout:
        corpora, windows = self.order.windows(_samples(steps, rows, self.n_rows))
        base = self.shelf.first_token[corpora]
        target = base + windows * self.seq_len + columns.start
        bos = target == base
        end = np.minimum(target + len(columns), self.shelf.first_token[corpora + 1])
        begin = np.minimum(target - 1 + bos, end)
        shape = Shape(len(steps), len(rows), len(columns))
        return packed_layout(self.shelf, shape, begin, end, bos)

    def epochs(self, step: int) -> list[int]:
        return self.order.epochs(step * self.n_rows)


class _PaddedWindows:
    """Windows over the documents of a corpus laid out as in one lane; 32 bytes per document."""

    def __init__(self, mixture: Mixture, seq_len: int, n_rows: int, grid: int, seed: int) -> None:
        self.seq_len, self.n_rows, self.grid = seq_len, n_rows, grid
        self.shelf = Shelf(mixture.corpora)
        places, n_windows = [], []
        for i, corpus in enumerate(mixture.corpora):
            slots = padded_slots(corpus.doc_lengths, grid)
            starts = np.cumsum(slots) - slots
            places.append((i << SLOT_BITS) + starts)
            # The last target is the EOS of the last document.
            n_windows.append(-(-int(starts[-1] + corpus.doc_lengths[-1]) // seq_len))
        joined = np.concatenate(places)
        self.table = DocumentTable(joined, np.arange(len(joined)))
        self.order = WindowMixture(mixture, n_windows, seq_len, seed)

    def layout(self, steps: range, rows: range, columns: range) -> Layout:
        corpora, windows = self.order.windows(_samples(steps, rows, self.n_rows))
        shape = Shape(len(steps), len(rows), len(columns), self.grid)
        first = windows * self.seq_len + columns.start
        return document_layout(self.shelf, shape, self.table, corpora, first)

    def epochs(self, step: int) -> list[int]:
        return self.order.epochs(step * self.n_rows)


class _Lanes:
    """Segment s of a lane is its slots [s*T, (s + 1)*T], one more than T."""

    def __init__(
        self,
        mixture: Mixture,
        seq_len: int,
        n_rows: int,
        grid: int,
        document_grid: int,
        seed: int,
    ) -> None:
        self.seq_len, self.grid = seq_len, grid
        self.shelf = Shelf(mixture.corpora)
        lengths = [corpus.doc_lengths for corpus in mixture.corpora]
        owners = lane_owners(mixture, n_rows, seq_len)
        self.order = LaneOrder(lengths, owners, document_grid, mixture.seeds(seed))

    def layout(self, steps: range, rows: range, columns: range) -> Layout:
        table = self.order.table(steps.stop * self.seq_len + 1)
        lanes = np.tile(np.arange(rows.start, rows.stop), len(steps))
        first = np.repeat(np.arange(steps.start, steps.stop) * self.seq_len, len(rows))
        shape = Shape(len(steps), len(rows), len(columns), self.grid)
        return document_layout(self.shelf, shape, table, lanes, first + columns.start)

    def epochs(self, step: int) -> list[int]:
        return self.order.epochs(step * self.seq_len)


def _part(n: int, i: int, parts: int) -> range:
    """The i-th of equal parts of range(n)."""
    return range(i * n // parts, (i + 1) * n // parts)


def _samples(steps: range, rows: range, n_rows: int) -> np.ndarray:
    """Samples, counted over the run, of `rows` of the global batch in `steps`."""
    first = np.arange(steps.start, steps.stop)[:, None] * n_rows
    return (first + np.arange(rows.start, rows.stop)).reshape(-1)


def prefetched(
    make: Callable[[int], Step], start_step: int, depth: int, threads: int = 1
) -> Iterator[Step]:
    """make(start_step), make(start_step + 1), ... in order, `depth` of them ahead, by threads."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def begin() -> None:
        if device is not None:  # A new thread starts on device 0 and would pin memory for it.
            torch.cuda.set_device(device)

    with ThreadPoolExecutor(threads, "prefetch", begin) as pool:
        ahead: deque[Future[Step]] = deque()
        try:
            for step in itertools.count(start_step):
                ahead.append(pool.submit(make, step))
                if len(ahead) > max(depth, threads):
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    return "nearest: " + " or ".join(str(n) for n in (below, below + unit) if n > 0)
