"""Tokenises units into shards, in this process or in several.

A unit is read, tokenised and written by one process, whichever, and nothing else goes in: so the
bytes of its shard follow from the unit and the tokenizer alone.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import MAX_DOCUMENT_BYTES, ShardDocuments, token_dtype, write_shard
from data.sources import Unit, read_unit
from data.tokenizer import EOS_ID, UNK_ID, SentencePieceTokenizer, Tokenizer, load_tokenizer

ROUNDTRIP_DOCUMENTS = 16  # per unit
ROUNDTRIP_CHARS = 2**20  # per document
# Counted per unit and added up over a split.
SUMS = ("raw_bytes", "words", "unk", "empty", "roundtrip_checked", "roundtrip_exact")


class WorkerKilledError(RuntimeError):
    """The operating system ended a worker process."""


def write_units(
    todo: list[tuple[Unit, Path]],
    text_field: str,
    tokenizer: Tokenizer,
    workers: int,
    report: Callable[[int, int], Any],
) -> None:
    """Writes the shards of all units, each under its path (without ending).

    Args:
        todo: units and the paths of their shards.
        text_field: column that holds the text.
        tokenizer: makes the ids.
        workers: processes.
        report: called with the bytes of text and the tokens that were done since its last call.

    Raises:
        ValueError: a unit's file cannot be read as planned.
        OSError: a shard cannot be written.
        WorkerKilledError: a worker process was killed.
    """
    if workers == 1 or len(todo) <= 1:
        for unit, stem in todo:
            write_unit(unit, stem, text_field, tokenizer, report)
        return
    # Spawned, not forked: the parent has threads (the progress bar's, SentencePiece's).
    context = multiprocessing.get_context("spawn")
    counter = context.Array("q", 2)  # bytes, tokens
    model = tokenizer.model if isinstance(tokenizer, SentencePieceTokenizer) else None
    start = (model, tokenizer.n_sentinels, text_field, counter)
    with ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, start) as pool:
        pending: set[Future[None]] = {pool.submit(_work, unit, stem) for unit, stem in todo}
        reported = [0, 0]
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                counted = counter[:]
                report(counted[0] - reported[0], counted[1] - reported[1])
                reported = counted
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise WorkerKilledError("a worker process was killed (out of memory?)") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def write_unit(
    unit: Unit,
    stem: Path,
    text_field: str,
    tokenizer: Tokenizer,
    report: Callable[[int, int], Any],
) -> None:
    """Tokenises one unit and writes its shard.

    Args:
        unit: the rows.
        stem: path of the shard without ending.
        text_field: column that holds the text.
        tokenizer: makes the ids.
        report: called with the bytes of text and the tokens that were done.

    Raises:
        ValueError: the unit's file cannot be read as planned.
        OSError: the shard cannot be written.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    parts: list[np.ndarray] = []
    lengths, raw_bytes, words, rows = [0], [], [], []
    counts = dict.fromkeys(SUMS, 0)
    for document in read_unit(unit, text_field):
        if not document.text:
            counts["empty"] += 1
            continue
        n_bytes = len(document.text.encode())
        if n_bytes > MAX_DOCUMENT_BYTES:
            raise ValueError(
                f"data: {unit.path!r} row {document.row} has {n_bytes:,} bytes, a document may "
                f"have {MAX_DOCUMENT_BYTES:,}: cut it into several"
            )
        ids = tokenizer.encode(document.text)
        parts += [ids.astype(dtype), np.array([EOS_ID], dtype)]
        lengths.append(len(ids) + 1)
        raw_bytes.append(n_bytes)
        words.append(len(document.text.split()))
        rows.append(document.row)
        counts["unk"] += int((ids == UNK_ID).sum())
        if counts["roundtrip_checked"] < ROUNDTRIP_DOCUMENTS:
            counts["roundtrip_checked"] += 1
            counts["roundtrip_exact"] += _round_trips(tokenizer, document.text)
        report(n_bytes, lengths[-1])
    # What was JSON around the text, for the bar to close.
    report(unit.text_bytes - sum(raw_bytes), 0)
    counts |= {"raw_bytes": sum(raw_bytes), "words": sum(words)}
    documents = ShardDocuments(
        np.concatenate([np.zeros(0, dtype), *parts]),
        np.cumsum(lengths),
        np.array(raw_bytes),
        np.array(words),
        np.array(rows),
    )
    facts = {
        "source": {"file": unit.name, "rows": [unit.start, unit.stop]},
        "tokenizer_sha256": tokenizer.sha256,
        "counts": {**counts, "longest": max(lengths)},
    }
    write_shard(stem, documents, facts)


def _round_trips(tokenizer: Tokenizer, text: str) -> bool:
    text = text[:ROUNDTRIP_CHARS]
    return tokenizer.decode(tokenizer.encode(text)) == text


_worker: dict[str, Any] = {}  # A worker process' tokenizer and settings.


def _start_worker(
    model: bytes | None, n_sentinels: int, text_field: str, counter: "SynchronizedArray[int]"
) -> None:
    def leave_with_parent() -> None:  # A killed parent would leave its workers waiting for ever.
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    def report(n_bytes: int, n_tokens: int) -> None:
        with counter.get_lock():
            counter[0] += n_bytes
            counter[1] += n_tokens

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _worker["tokenizer"] = (
        load_tokenizer("bytes", n_sentinels)
        if model is None
        else SentencePieceTokenizer(model, n_sentinels)
    )
    _worker["text_field"], _worker["report"] = text_field, report


def _work(unit: Unit, stem: Path) -> None:
    write_unit(unit, stem, _worker["text_field"], _worker["tokenizer"], _worker["report"])
