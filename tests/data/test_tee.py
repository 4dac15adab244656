"""Shards written while streaming: the same stream, and a corpus like any other."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_jsonl

from data import tee as tee_module
from data.loader import build_loader
from data.shards import Corpus, verify
from data.sources import Document
from data.stream import StreamLoader, StreamSource
from data.tee import Tee
from data.tokenizer import BytesTokenizer

T, G, V, N_STEPS = 64, 8, 4, 200
TOKENIZER = BytesTokenizer()


@pytest.fixture
def source(texts: list[str], tmp_path: Path) -> StreamSource:
    """Three files for four streams: every file has two parts."""
    folder = tmp_path / "texts"
    folder.mkdir()
    files = [write_jsonl(folder / f"{i}.jsonl", ["", *texts[i::3], ""]) for i in range(3)]
    return StreamSource(tuple((path.name, str(path), 0) for path in files), "text")


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Rows with text that a tee has read from the sources' files."""
    rows: list[tuple[str, int]] = []

    def read_rows(path: str, *arguments: Any, **options: Any) -> Iterator[Document]:
        for document in original(path, *arguments, **options):
            if document.text:
                rows.append((path, document.row))
            yield document

    original = tee_module.read_rows
    monkeypatch.setattr(tee_module, "read_rows", read_rows)
    return rows


def loader_of(source: StreamSource, tee: Tee | None = None) -> StreamLoader:
    return StreamLoader(
        source,
        TOKENIZER,
        seq_len=T,
        global_batch_size=G,
        micro_batch_size=G,
        streams=V,
        shuffle_windows=3,
        read_part=tee.read if tee else None,
    )


def rows_of(loader: StreamLoader, start: int, stop: int) -> torch.Tensor:
    return torch.stack([batch.tokens for (batch,) in islice(loader.steps(start), stop - start)])


def new_tee(source: StreamSource, folder: Path, **changes: object) -> Tee:
    tee = Tee(folder, "train", source, TOKENIZER, V, segment_bytes=5000, **changes)
    tee.start()
    return tee


def test_a_tee_changes_no_row_and_leaves_a_corpus(
    source: StreamSource, tmp_path: Path, texts: list[str], rows_read: list[tuple[str, int]]
) -> None:
    plain = rows_of(loader_of(source), 0, N_STEPS)
    folder = tmp_path / "corpus"
    loader = loader_of(source, new_tee(source, folder))
    assert torch.equal(rows_of(loader, 0, N_STEPS), plain)
    assert loader.state(N_STEPS)["epoch"] >= 1, "some of it came from shards"
    # Two streams in one part may open it in turns, each where the other stopped.
    assert len(rows_read) == len(set(rows_read)) == len(texts), "every row is read once"
    assert verify(folder) == []
    corpus = Corpus.open(folder)
    assert len(corpus.manifest["splits"]["train"]["shards"]) > 6, "parts have several segments"
    documents = [TOKENIZER.decode(corpus.document(i)) for i in range(corpus.n_documents)]
    assert sorted(documents) == sorted(texts)
    assert corpus.raw_bytes.sum() == sum(len(text.encode()) for text in texts)
    windows = build_loader(
        corpus, mode="windows", seq_len=T, global_batch_size=4, micro_batch_size=4
    )
    assert next(iter(windows.steps(0)))[0].tokens.shape == (4, T + 1)
    # A later run maps all of it.
    rows_read.clear()
    again = loader_of(source, new_tee(source, folder))
    assert torch.equal(rows_of(again, 0, N_STEPS), plain)
    assert rows_read == []


def test_a_stopped_tee_goes_on_behind_its_last_shard(source: StreamSource, tmp_path: Path) -> None:
    plain = rows_of(loader_of(source), 0, N_STEPS)
    rows_of(loader_of(source, new_tee(source, tmp_path / "whole")), 0, N_STEPS)
    fingerprint = Corpus.open(tmp_path / "whole").fingerprint
    for stop in (7, 16, 30):
        folder = tmp_path / f"stopped{stop}"
        loader = loader_of(source, new_tee(source, folder))
        rows_of(loader, 0, stop)
        state = loader.state(stop)
        newest = sorted((folder / "train").glob("*.json"))[-1]
        newest.unlink()  # Killed before the sidecar: the shard does not count.
        again = loader_of(source, new_tee(source, folder))
        again.check_state(state)
        assert torch.equal(rows_of(again, stop, N_STEPS), plain[stop:])
        assert verify(folder) == []
        assert Corpus.open(folder).fingerprint == fingerprint


def test_a_shard_lost_within_a_finished_part_is_made_again(
    source: StreamSource, tmp_path: Path
) -> None:
    plain = rows_of(loader_of(source), 0, N_STEPS)
    folder = tmp_path / "corpus"
    rows_of(loader_of(source, new_tee(source, folder)), 0, N_STEPS)
    fingerprint = Corpus.open(folder).fingerprint
    first = folder / "train" / "00000-00000.bin"
    assert first.with_name("00000-00001.bin").exists(), "more of the part would be lost with it"
    # Another file in its place: the first loader's threads may still read the one they have mapped.
    damaged = tmp_path / "damaged"
    damaged.write_bytes(first.read_bytes()[:100])
    damaged.replace(first)
    assert torch.equal(rows_of(loader_of(source, new_tee(source, folder)), 0, N_STEPS), plain)
    assert verify(folder) == []
    assert Corpus.open(folder).fingerprint == fingerprint


def test_a_folder_with_something_else_is_refused(source: StreamSource, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    new_tee(source, folder)
    other = StreamSource(source.files[:2], "text")
    with pytest.raises(ValueError, match=r"holds a corpus of another streamed; choose another"):
        new_tee(other, folder)
    with pytest.raises(ValueError, match="not empty, and no corpus"):
        new_tee(source, tmp_path / "texts")
