"""Encoder-decoder batches: `batch = f(fingerprint, seed, step)`, as in the window loader beneath.

An objective of k corruptions (UL2: seven, the others: one) reads windows of the k source lengths
together and takes k steps for them: at each, a row gives the part for one of its corruptions, in an
order hashed for the row. So every token is read exactly once per epoch, every encoder input is
exactly full, a mixture is exact in each k steps, and any batch size will do. The price: a row's k
consecutive parts come from one place in the text; and targets are as long as the longest of the k
needs (UL2: as long as the inputs), the rest of them PAD.

Masks depend on (seed, step, row of the global batch): world size and micro-batch do not enter.
Only the last window of an epoch can be partial: its rows are corrupted at their own length.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data.denoising import (
    Corruption,
    Sentinels,
    SpanCorruption,
    check_sentinels,
    row_keys,
    ul2_corruptions,
)
from data.gap_sentences import GapSentences
from data.loader import Loader, build_loader, prefetched
from data.order import check_identity
from data.shards import Corpus
from data.tokenizer import PAD_ID, Tokenizer
from pretrain.batch import Batch, EncoderDecoderBatch

OBJECTIVES = ("span", "ul2", "gap")
BLOCK_TOKENS = (
    10_000  # Corrupted at once: larger temporary arrays come as fresh pages, at half speed.
)
ORDER_KEY, EVALUATION_KEY = 1, 2  # Keep the streams of hashes apart.


def corruptions_of(objective: str, tokenizer: Tokenizer) -> list[Corruption]:
    """What an objective mixes, in equal parts.

    Raises:
        ValueError: there is no such objective.
    """
    sentinels = Sentinels.of(tokenizer)
    if objective == "span":
        return [SpanCorruption(sentinels)]
    if objective == "ul2":
        return [*ul2_corruptions(sentinels)]
    if objective == "gap":
        return [GapSentences(tokenizer)]
    raise ValueError(f"objective={objective}: must be one of {', '.join(OBJECTIVES)}")


def build_denoising_loader(
    corpus: Corpus,
    *,
    objective: str,
    encoder_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    prefetch_steps: int = 2,
) -> "DenoisingLoader":
    """The loader of one rank; arguments as of `data.loader.build_loader`.

    Args:
        corpus: an opened split.
        objective: "span", "ul2" or "gap".
        encoder_length: S; the target length T follows from it.
        global_batch_size: rows of one optimizer step over all ranks.
        micro_batch_size: rows of one forward on one rank.
        rank: data-parallel rank.
        world_size: data-parallel size.
        seed: chooses the order and the masks.
        prefetch_steps: steps made ahead by a thread; 0 makes them in the caller's.

    Raises:
        ValueError: an argument does not fit, or the vocabulary has too few sentinels.
    """
    corruptions = corruptions_of(objective, corpus.tokenizer)
    needed = max(corruption.n_sentinels(encoder_length) for corruption in corruptions)
    check_sentinels(Sentinels.of(corpus.tokenizer), needed, objective, encoder_length)
    windows = build_loader(
        corpus,
        mode="windows",
        seq_len=sum(corruption.source_length(encoder_length) for corruption in corruptions),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=seed,
        prefetch_steps=0,
    )
    first_row = rank * (global_batch_size // world_size)
    rows = Corrupter(corruptions, Sentinels.of(corpus.tokenizer), encoder_length)
    return DenoisingLoader(windows, rows, objective, seed, first_row, prefetch_steps)


class DenoisingLoader:
    """A `pretrain.batch.StepLoader[EncoderDecoderBatch]` over one that delivers windows."""

    def __init__(
        self,
        windows: Loader,
        corrupter: "Corrupter",
        objective: str,
        seed: int,
        first_row: int,
        prefetch_steps: int,
    ) -> None:
        self._windows, self._corrupter, self._seed = windows, corrupter, seed
        self._first_row, self._prefetch_steps = first_row, prefetch_steps
        self._identity = {
            "objective": objective,
            "encoder_length": corrupter.encoder_length,
            "corruptions": [corruption.settings() for corruption in corrupter.corruptions],
        }

    def steps(self, start_step: int) -> Iterator[list[EncoderDecoderBatch]]:
        """This rank's micro-batches of step `start_step`, `start_step + 1`, ... for ever."""
        steps = self._steps(start_step)
        if self._prefetch_steps:
            return prefetched(lambda _: next(steps), start_step, self._prefetch_steps)
        return steps

    def state(self, step: int) -> dict[str, Any]:
        """The position after `step` steps: that of the windows, the objective, and an integer."""
        windows = self._windows.state(step // len(self._corrupter.corruptions))
        return {**self._identity, "step": step, "windows": windows}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Compares a saved position with what this loader would have saved.

        Raises:
            ValueError: naming each difference.
        """
        check_identity(saved, self._identity)
        self._windows.check_state(saved["windows"])

    def _steps(self, start_step: int) -> Iterator[list[EncoderDecoderBatch]]:
        n_parts = len(self._corrupter.corruptions)
        step = start_step
        for micro_batches in self._windows.steps(start_step // n_parts):
            for _ in range(n_parts - step % n_parts):
                yield self._step(micro_batches, step)
                step += 1

    def _step(self, micro_batches: list[Batch], step: int) -> list[EncoderDecoderBatch]:
        n_parts = len(self._corrupter.corruptions)
        bundle, turn = divmod(step, n_parts)
        first, out = self._first_row, []
        for windows in micro_batches:
            # A window's first token is the last of the one before it in the text.
            tokens, doc_id = windows.tokens[:, 1:].numpy(), windows.doc_id[:, 1:].numpy()
            rows = np.arange(first, first + len(tokens))
            order = np.argsort(
                row_keys(ORDER_KEY, self._seed, bundle, rows[:, None], np.arange(n_parts)), axis=1
            )
            keys = row_keys(self._seed, step, rows)
            n_tokens = (doc_id >= 0).sum(1)
            batch = self._corrupter.batch(tokens, n_tokens, order[:, turn], keys)
            is_full = batch.encoder_mask is not None and bool(batch.encoder_mask.all())
            out.append(batch._replace(encoder_mask=None) if is_full else batch)
            first += len(tokens)
        return out


class Corrupter:
    """Rows of windows to batches of fixed shape.

    Args:
        corruptions: the parts of a window, in this order.
        sentinels: of the vocabulary.
        encoder_length: S.

    Attributes:
        target_length: T.
    """

    def __init__(
        self, corruptions: list[Corruption], sentinels: Sentinels, encoder_length: int
    ) -> None:
        self.corruptions, self.sentinels = corruptions, sentinels
        self.encoder_length = encoder_length
        self.target_length = max(c.target_length(encoder_length) for c in corruptions)
        lengths = [corruption.source_length(encoder_length) for corruption in corruptions]
        self._edges = np.cumsum([0, *lengths])

    def batch(
        self, windows: np.ndarray, n_tokens: np.ndarray, part: np.ndarray, keys: np.ndarray
    ) -> EncoderDecoderBatch:
        """One part of each window, corrupted.

        Args:
            windows: (B, n) int64, n the sum of the source lengths.
            n_tokens: (B,) tokens of each window; what is behind them is PAD.
            part: (B,) index of a corruption for each row.
            keys: (B,) uint64.
        """
        n_rows = len(windows)
        encoder = np.full((n_rows, self.encoder_length), PAD_ID, np.int64)
        decoder = np.full((n_rows, self.target_length + 1), PAD_ID, np.int64)
        start = self._edges[part]
        n = np.clip(n_tokens, start, self._edges[part + 1]) - start
        # Rows with the same corruption and length go together: all but an epoch's last window.
        for which, length in {*zip(part.tolist(), n.tolist(), strict=True)}:
            together = np.flatnonzero((part == which) & (n == length))
            n_blocks = -(-len(together) * length // BLOCK_TOKENS) or 1
            for rows in np.array_split(together, min(n_blocks, len(together))):
                source = windows[rows, self._edges[which] : self._edges[which] + length]
                inputs, targets = self.corruptions[which].corrupt(source, keys[rows])
                encoder[rows, : inputs.shape[1]] = inputs
                decoder[rows, 1 : targets.shape[1] + 1] = targets
        arrays = (
            encoder,
            encoder != PAD_ID,
            decoder,
            decoder[:, 1:] != PAD_ID,
            self.sentinels.contain(decoder[:, 1:]),
        )
        tensors = map(torch.from_numpy, arrays)
        # Only pinned memory is copied to the device while it computes.
        pinned = torch.cuda.is_available()
        return EncoderDecoderBatch(*(t.pin_memory() if pinned else t for t in tensors))


def evaluation_batches(
    corpus: Corpus,
    corruption: Corruption,
    encoder_length: int,
    batch_size: int,
    *,
    max_documents: int | None = None,
    max_chunks: int | None = None,
) -> Iterator[tuple[np.ndarray, EncoderDecoderBatch]]:
    """The documents of a split in chunks, each with the same mask at every call.

    A mask depends on (document, chunk) alone: two models, and one model at two steps, are asked the
    same questions. A chunk never reaches over the end of its document; the last one of a document
    is as short as it is.

    Args:
        corpus: an opened split.
        corruption: one of an objective's, since a mixture has no single loss.
        encoder_length: S.
        batch_size: chunks of a batch; the last batch may have fewer.
        max_documents: only the first ones of the split; None: all.
        max_chunks: only the first ones of each document; None: all.

    Yields:
        The document of each row, (B,) int64, and the batch.

    Raises:
        ValueError: the vocabulary has too few sentinels.
    """
    sentinels = Sentinels.of(corpus.tokenizer)
    check_sentinels(sentinels, corruption.n_sentinels(encoder_length), "evaluation", encoder_length)
    corrupter = Corrupter([corruption], sentinels, encoder_length)
    length = corruption.source_length(encoder_length)
    lengths = corpus.doc_lengths[:max_documents]
    n_chunks = np.minimum(-(-lengths // length), max_chunks or corpus.n_tokens)
    chunks = np.repeat(np.arange(len(lengths)), n_chunks)
    first_chunk = np.searchsorted(chunks, chunks)
    for begin in range(0, len(chunks), batch_size):
        documents = chunks[begin : begin + batch_size]
        number = np.arange(begin, begin + len(documents)) - first_chunk[begin:][: len(documents)]
        windows = np.full((len(documents), length), PAD_ID, np.int64)
        n_tokens = np.minimum(lengths[documents] - number * length, length)
        for row, document in enumerate(documents.tolist()):
            start = int(number[row]) * length
            text = corpus.document(document)[start : start + length]
            windows[row, : len(text)] = text
        keys = row_keys(EVALUATION_KEY, documents, number)
        part = np.zeros(len(documents), np.int64)
        yield documents, corrupter.batch(windows, n_tokens, part, keys)
