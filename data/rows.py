"""Which tokens fill the rows of a batch, and their copying out of memory-mapped shards.

A layout says it for many steps at once, in arrays that numpy makes without a loop over rows; what
is left for a step is one call that joins its pieces and a few passes over the batch. Shapes: B
rows, T seq_len, a row has width T + 1; `at` is a slot of the rows of all steps laid end on end.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data.order import DocumentTable, expand
from data.shards import Corpus
from data.tokenizer import BOS_ID, PAD_ID


class Shelf:
    """The shards of some corpora, end on end: one space of tokens and one of documents.

    Attributes:
        dtype: of tokens.
        token_base: tokens before each shard, then all.
        first_token: tokens before each corpus, then all.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.shards = [shard for corpus in corpora for shard in corpus.shards if len(shard.tokens)]
        self.dtype = self.shards[0].tokens.dtype
        self.token_base = np.cumsum([0, *(len(shard.tokens) for shard in self.shards)])
        self.doc_base = np.cumsum([0, *(len(shard.doc_start) - 1 for shard in self.shards)])
        self.first_token = np.cumsum([0, *(corpus.n_tokens for corpus in corpora)])

    @cached_property
    def document_starts(self) -> np.ndarray:
        """The first token of every document, then all tokens; 8 bytes per document in memory."""
        starts = [
            shard.doc_start[:-1] + base
            for shard, base in zip(self.shards, self.token_base, strict=False)
        ]
        return np.concatenate([*starts, self.token_base[-1:]])

    def documents(
        self, at: np.ndarray, shards: np.ndarray, begin: np.ndarray, end: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cuts pieces [begin, end) of shards at documents: `at` of each part, and its document.

        Reads only those pages of the indices that it needs.
        """
        order = np.argsort(self.token_base[shards] + begin)  # Ascending, they are found sooner.
        edges = np.flatnonzero(np.diff(shards[order], prepend=-1, append=-1)).tolist()
        places, documents, counts = [], [], np.empty_like(at)
        for i, j in pairwise(edges):
            here = order[i:j]
            shard = int(shards[here[0]])
            pieces, found, cut = _cut(begin[here], end[here], self.shards[shard].doc_start)
            places.append((at - begin)[here][pieces] + cut)
            documents.append(found + self.doc_base[shard])
            counts[here] = np.bincount(pieces)
        # Back from the order of the search to that of the pieces.
        _, target = expand((np.cumsum(counts) - counts)[order], counts[order])
        sorted_places, sorted_documents = np.empty_like(target), np.empty_like(target)
        sorted_places[target] = np.concatenate(places)
        sorted_documents[target] = np.concatenate(documents)
        return sorted_places, sorted_documents


class Shape(NamedTuple):
    """Rows of some steps, in the order (step, row).

    Attributes:
        n_steps: steps.
        n_rows: B, of each step.
        seq_len: T.
        grid: of resets; 0 for batches without.
    """

    n_steps: int
    n_rows: int
    seq_len: int
    grid: int = 0


class Pieces(NamedTuple):
    """Runs of slots, ascending and without gaps, that are copied from somewhere.

    Attributes:
        at: first slot.
        source: index of a shard; behind the shards, `FILL`: padding that may end in a BOS.
        begin: first token in the source.
    """

    at: np.ndarray
    source: np.ndarray
    begin: np.ndarray


FILL = -1  # As a source: a row of padding, then BOS twice.


def packed_layout(
    shelf: Shelf, shape: Shape, begin: np.ndarray, end: np.ndarray, bos: np.ndarray
) -> "Layout":
    """Rows of tokens as they stand on the shelf, documents behind one another.

    Args:
        shelf: where the tokens are.
        shape: of the rows.
        begin: (n_steps * n_rows,) first token of each row.
        end: (n_steps * n_rows,) behind its last one; what is left of the row is padding.
        bos: (n_steps * n_rows,) bool, whether the row's first slot is BOS.
    """
    width = shape.seq_len + 1
    corner = np.arange(len(begin)) * width
    rows, shards, cut = _cut(begin, end, shelf.token_base)
    base = shelf.token_base[shards]
    at = (corner + bos - begin)[rows] + cut
    until = np.minimum(end[rows] - base, shelf.token_base[shards + 1] - base)
    run_at, documents = shelf.documents(at, shards, cut - base, until)
    # BOS is counted to the document behind it.
    run_at[run_at.searchsorted(corner[bos])] -= 1
    filled = corner + bos + end - begin
    padded = filled < corner + width
    pad = filled[padded]
    pieces = Pieces(
        np.concatenate([at, corner[bos], pad]),
        np.concatenate([shards, np.full(bos.sum() + len(pad), FILL)]),
        np.concatenate([cut - base, np.full(bos.sum(), width), np.zeros(len(pad), np.int64)]),
    )
    order = np.argsort(pieces.at, kind="stable")
    run_order = np.argsort(np.concatenate([run_at, pad]), kind="stable")
    return Layout(
        shelf,
        shape,
        Pieces(*(part[order] for part in pieces)),
        np.concatenate([run_at, pad])[run_order],
        np.concatenate([documents, np.full(len(pad), -1)])[run_order],
        np.zeros(0, np.int64),
    )


def document_layout(
    shelf: Shelf, shape: Shape, table: DocumentTable, lanes: np.ndarray, first: np.ndarray
) -> "Layout":
    """Rows of documents that begin, with a BOS, where a table says; padding is between them.

    Args:
        shelf: where the tokens are.
        shape: of the rows.
        table: says where documents begin.
        lanes: (n_steps * n_rows,) the lane of each row.
        first: (n_steps * n_rows,) the slot of the lane at which it begins.
    """
    width = shape.seq_len + 1
    rows, documents, bos = table.find(lanes, first, width)
    token = shelf.document_starts[documents]
    length = shelf.document_starts[documents + 1] - token
    shard = shelf.token_base.searchsorted(token, "right") - 1
    # In a row a document has slots for BOS, tokens and padding, as far as they are inside.
    corner = rows * width
    columns = np.clip(np.stack([bos, bos + 1, bos + 1 + length], 1), 0, width)
    at = corner[:, None] + columns
    begin = token - shelf.token_base[shard] + columns[:, 1] - (bos + 1)
    # What is between the tokens of two documents, or at the start of a row, is one piece.
    opens_row = np.diff(rows, prepend=-1) != 0
    between = np.where(opens_row, corner, np.roll(at[:, 2], 1))
    pieces_at = np.stack([between, at[:, 1]], 1)
    source = np.stack([np.full_like(shard, FILL), shard], 1).reshape(-1)
    begin = np.stack([width + 1 - (at[:, 1] - between), begin], 1).reshape(-1)
    # A BOS that ends a row and one that begins the next row of the step are one piece, too.
    both = opens_row[1:] & (columns[:-1, 1] == width) & (columns[1:, 1] == 1)
    twice = np.flatnonzero(both & (rows[1:] % shape.n_rows > 0))
    pieces_at[twice, 1] += 1
    pieces_at[twice + 1, 0] += 1
    # Only rows of the last window of an epoch can end in padding.
    closes_row = np.roll(opens_row, -1)
    ends = np.flatnonzero(closes_row & (columns[:, 2] < width))
    pieces = Pieces(
        np.insert(pieces_at.reshape(-1), 2 * ends + 2, at[ends, 2]),
        np.insert(source, 2 * ends + 2, FILL),
        np.insert(begin, 2 * ends + 2, 0),
    )
    return Layout(
        shelf,
        shape,
        pieces,
        at[:, [0, 2]].reshape(-1),
        np.stack([documents, np.full_like(documents, -1)], 1).reshape(-1),
        at[(bos >= 0) & (bos < shape.seq_len), 0],
    )


class Layout:
    """What fills the rows of some steps.

    Args:
        shelf: where tokens come from.
        shape: of the rows.
        pieces: what is copied, covering all slots; some may be empty.
        run_at: first slot of each run of one document or of padding, covering all; some are empty.
        run_documents: the document of each run, or -1.
        starts: slots of inputs at which the model is reset.
    """

    def __init__(
        self,
        shelf: Shelf,
        shape: Shape,
        pieces: Pieces,
        run_at: np.ndarray,
        run_documents: np.ndarray,
        starts: np.ndarray,
    ) -> None:
        width = shape.seq_len + 1
        size = shape.n_rows * width
        edges = np.arange(shape.n_steps + 1) * size
        self._dtype = shelf.dtype
        fill = np.full(width + 2, PAD_ID, shelf.dtype)
        fill[width:] = BOS_ID
        self._sources = [shard.tokens.data for shard in shelf.shards] + [fill.data]

        length = np.diff(pieces.at, append=edges[-1])
        filled = np.flatnonzero(length)
        self._length, self._source = length[filled], pieces.source[filled]
        self._begin = pieces.begin[filled]
        self._piece_edges = pieces.at[filled].searchsorted(edges).tolist()

        self._run_length = np.diff(run_at, append=edges[-1])
        # As narrow as they can be: a step's are spread out once, and widened as they are copied.
        self._run_document = run_documents.astype(np.min_scalar_type(-1 - shelf.doc_base[-1]))
        self._run_edges = run_at.searchsorted(edges).tolist()

        self._start_edges = starts.searchsorted(edges).tolist()
        row, column = np.divmod(starts % size, width)
        if shape.grid:
            self._starts = row * (shape.seq_len // shape.grid) + column // shape.grid

    def fill(
        self,
        step: int,
        tokens: np.ndarray,
        loss_mask: np.ndarray,
        resets: np.ndarray | None,
        doc_id: np.ndarray,
    ) -> None:
        """Writes every element of the arrays of the `step`-th step, as `pretrain.batch.Batch`."""
        here = slice(*self._piece_edges[step : step + 2])
        source, begin, length = self._source[here], self._begin[here], self._length[here]
        # Joining bytes is twice as fast as numpy's assignment of slices, when they are short, and
        # a loop over Python's integers as one over numpy's.
        pieces = zip(source.tolist(), begin.tolist(), (begin + length).tolist(), strict=True)
        joined = b"".join([self._sources[i][start:stop] for i, start, stop in pieces])
        tokens.reshape(-1)[:] = np.frombuffer(joined, self._dtype)
        # Whatever comes from a document is a target, except in slot 0, where none is.
        loss_mask[:] = np.repeat(source != FILL, length).reshape(tokens.shape)[:, 1:]
        here = slice(*self._run_edges[step : step + 2])
        doc_id.reshape(-1)[:] = np.repeat(self._run_document[here], self._run_length[here])
        if resets is not None:
            resets.fill(False)
            here = slice(*self._start_edges[step : step + 2])
            resets.reshape(-1)[self._starts[here]] = True


def _cut(
    begin: np.ndarray, end: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts intervals [begin, end) at ascending edges: interval, cell and begin of each part."""
    first = edges.searchsorted(begin, "right") - 1
    intervals, cells = expand(first, edges.searchsorted(end) - first)
    return intervals, cells, np.maximum(edges[cells], begin[intervals])
