"""Sources on the hub: the real reading code against a hub on loopback, whole and failing."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from loopback_hub import COMMIT, LoopbackHub

from data import hub
from data.shards import Corpus, verify
from data.sources import Document, find_files, hash_file, read_rows
from launch import prepare

CONFIGS = Path(prepare.__file__).parents[1] / "configs" / "data"
DATASET, FOLDER = "allenai/c4", "en"
FAULTS = ("502", "stall", "cut", "short", "lost", "gone")

# Of each data set the file names and columns that the hub shows; * marks what is read.
LAYOUT = {
    "pg19": (
        "emozilla/pg19",
        {
            "train": "data/train-00000-of-00023-5263dc4323e881d2.parquet",
            "validation": "data/validation-00000-of-00001.parquet",
            "test": "data/test-00000-of-00001-29a571947c0b5ccc.parquet",
        },
        ["short_book_title", "publication_date", "url", "*text"],
    ),
    "arxiv_papers": (
        "common-pile/arxiv_papers_filtered",
        {"train": "00000_arxiv-papers.jsonl.gz"},
        ["*text", "id", "source"],
    ),
    "arxiv_latex": (
        "EleutherAI/proof-pile-2",
        {
            "train": "arxiv/train/arXiv_000.jsonl.zst",
            "validation": "arxiv/validation/arXiv_000.jsonl.zst",
            "test": "arxiv/test/arXiv_000.jsonl.zst",
        },
        ["*text", "meta"],
    ),
    "arxiv_summarization": (
        "ccdv/arxiv-summarization",
        {
            "train": "section/train-00000-of-00015.parquet",
            "validation": "section/validation-00000-of-00001.parquet",
            "test": "section/test-00000-of-00001.parquet",
        },
        ["*article", "abstract"],
    ),
    "pubmed_summarization": (
        "ccdv/pubmed-summarization",
        {
            "train": "section/train-00000-of-00005.parquet",
            "validation": "section/validation-00000-of-00001.parquet",
            "test": "section/test-00000-of-00001.parquet",
        },
        ["*article", "abstract"],
    ),
    "c4_en": (
        "allenai/c4",
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        ["*text", "timestamp", "url"],
    ),
    "wikitext103": (
        "EleutherAI/wikitext_document_level",
        {
            "train": "wikitext-103-raw-v1/wikitext-103-raw-v1-train.parquet",
            "validation": "wikitext-103-raw-v1/wikitext-103-raw-v1-validation.parquet",
            "test": "wikitext-103-raw-v1/wikitext-103-raw-v1-test.parquet",
        },
        ["*page"],
    ),
    "glue": (
        "nyu-mll/glue",
        {
            "train": "mnli/train-00000-of-00001.parquet",
            "validation": "mnli/validation_matched-00000-of-00001.parquet",
            "validation_mismatched": "mnli/validation_mismatched-00000-of-00001.parquet",
        },
        ["*premise", "*hypothesis", "label", "idx"],
    ),
    "cnn_dailymail": (
        "abisee/cnn_dailymail",
        {
            "train": "3.0.0/train-00000-of-00003.parquet",
            "validation": "3.0.0/validation-00000-of-00001.parquet",
            "test": "3.0.0/test-00000-of-00001.parquet",
        },
        ["*article", "highlights", "id"],
    ),
}


def write_rows(path: Path, rows: list[dict[str, str]], row_group_size: int = 5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
        return
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    codec = {".gz": gzip.compress, ".zst": lambda b: pyarrow.compress(b, "zstd", asbytes=True)}
    path.write_bytes(codec[path.suffix](lines))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    server = LoopbackHub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "BLOCK_BYTES", 4096)  # Files here are small, and shall have blocks.
    monkeypatch.setattr(hub, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(hub, "FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(hub, "LONGEST_PAUSE_SECONDS", 0.08)
    yield server
    server.close()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """They hardly compress, so that every form of the file has several blocks."""
    generator = random.Random(5)
    return [generator.randbytes(generator.randrange(900)).hex() for _ in range(36)]


@pytest.fixture(params=["c4-train.00000-of-01024.json.gz", "data.parquet", "arXiv_000.jsonl.zst"])
def location(server: LoopbackHub, texts: list[str], request: pytest.FixtureRequest) -> str:
    """A file with the texts, as resolved."""
    write_rows(server.root / DATASET / FOLDER / request.param, [{"text": text} for text in texts])
    ((_, path),) = find_files(f"{hub.SCHEME}{DATASET}/{FOLDER}/{request.param}")
    return path


def test_every_shipped_source_is_in_the_table() -> None:
    shipped = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert shipped == {*LAYOUT, "enwik8", "books_sample", "books_denoising"}


@pytest.mark.parametrize("name", LAYOUT)
def test_a_shipped_source_is_prepared_from_files_named_as_on_the_hub(
    name: str, server: LoopbackHub, tmp_path: Path
) -> None:
    dataset, splits, columns = LAYOUT[name]
    for split, file in splits.items():
        rows = [{c.strip("*"): f"{split} {i} {c}" for c in columns} for i in range(3)]
        write_rows(server.root / dataset / file, rows)
    out = tmp_path / "corpus"
    assert prepare.main([f"data={name}", f"out={out}", "tokenizer=bytes"]) == 0
    assert verify(out) == []
    read = [column for column in columns if column.startswith("*")]
    for split in splits:
        corpus = Corpus.open(out, split)
        texts = [corpus.tokenizer.decode(corpus.document(i)) for i in range(corpus.n_documents)]
        assert texts == ["\n".join(f"{split} {i} {c}" for c in read) for i in range(3)]


def test_enwik8_is_split_by_bytes_of_its_single_row(server: LoopbackHub, tmp_path: Path) -> None:
    whole = "0123456789é船" * 1000  # 15 bytes each
    path = server.root / "LTCB/enwik8/enwik8-raw/train/0000.parquet"
    write_rows(path, [{"text": whole}])
    places = prepare.load_prepare_config(["data=enwik8"]).splits
    assert [place.rpartition("#bytes=")[2] for place in places.values()] == [
        "0-90000000",
        "90000000-95000000",
        "95000000-100000000",
    ]
    cuts = {"train": "0-9011", "validation": "9011-9523", "test": "9523-15000"}
    arguments = [
        f"splits.{split}={places[split].rpartition('#')[0]}#bytes={cut}"
        for split, cut in cuts.items()
    ]
    out = tmp_path / "corpus"
    assert prepare.main(["data=enwik8", f"out={out}", *arguments]) == 0
    texts = [Corpus.open(out, split) for split in cuts]
    parts = [corpus.tokenizer.decode(corpus.document(0)) for corpus in texts]
    assert "".join(parts) == whole
    # Byte 9011 lies inside é and 9523 inside 船: those parts end behind the character.
    assert [len(part.encode()) for part in parts] == [9012, 513, 5475]


def test_a_pattern_is_resolved_to_one_commit_over_all_pages_of_the_listing(
    server: LoopbackHub,
) -> None:
    for i in range(5):
        write_rows(server.root / DATASET / f"en/c4-train.{i}.json.gz", [{"text": "a"}])
    write_rows(server.root / DATASET / "en/deeper/c4-train.9.json.gz", [{"text": "a"}])
    (server.root / DATASET / "README.md").write_text("about")
    found = find_files(f"{hub.SCHEME}{DATASET}/en/c4-train.*.json.gz")
    assert [name for name, _ in found] == [f"en/c4-train.{i}.json.gz" for i in range(5)]
    assert found[0][1] == f"{hub.SCHEME}{DATASET}@{COMMIT}/en/c4-train.0.json.gz"
    assert len(find_files(f"{hub.SCHEME}{DATASET}@some-branch/en")) == 6


def test_preparation_keeps_to_the_commit_that_it_began_with(
    server: LoopbackHub, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        write_rows(server.root / DATASET / f"en/c4-{split}.0.json.gz", [{"text": split}])
    out = tmp_path / "corpus"
    arguments = ["data=c4_en", f"out={out}", "tokenizer=bytes"]
    assert prepare.main(arguments) == 0
    assert sum("/revision/" in path for path in server.requests) == 1, "not once per split"
    before = Corpus.open(out).manifest
    assert before["inputs"]["commits"] == {"allenai/c4@main": COMMIT}
    (out / "manifest.json").unlink()  # As if it had been killed.
    server.commit = "f" * 40
    assert prepare.main(arguments) == 0
    assert Corpus.open(out).manifest == before


@pytest.mark.slow  # `datasets` takes its time to be imported, and knows one hub per process.
def test_datasets_reads_the_same_rows_from_the_same_hub(
    location: str, server: LoopbackHub, texts: list[str], tmp_path: Path
) -> None:
    kind = "parquet" if location.endswith(".parquet") else "json"
    script = f"""
import datasets, json
rows = datasets.load_dataset({kind!r}, data_files={location!r}, streaming=True, split="train")
print(json.dumps([row["text"] for row in rows]))
"""
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == texts
    assert [document.text for document in read_rows(location, "text")] == texts


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_hub_delays_rows_and_changes_none(
    fault: str, location: str, server: LoopbackHub, texts: list[str]
) -> None:
    """Also with faults of every other kind mixed in, in the middle of a file."""
    generator = random.Random(fault)
    server.faults = [fault, "", *generator.choices(("", *FAULTS[:1], *FAULTS[2:]), k=7)]
    rows = list(read_rows(location, "text"))
    assert rows == [Document(text, i) for i, text in enumerate(texts)]
    assert not server.faults, "all faults were met"


def test_reading_some_rows_of_a_remote_file(location: str, texts: list[str]) -> None:
    for rows in (range(7, 29), range(3, 36, 4), range(30, 10**9), range(0)):
        expected = [Document(text, i) for i, text in enumerate(texts) if i in rows]
        assert list(read_rows(location, "text", rows)) == expected


def test_a_hub_that_is_away_for_a_while_is_waited_for(
    location: str, server: LoopbackHub, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        server.away = len(pauses) < 5

    monkeypatch.setattr(time, "sleep", sleep)
    server.away = True
    assert list(read_rows(location, "text")) == [Document(text, i) for i, text in enumerate(texts)]
    assert len(pauses) == 5
    assert max(pauses[3:]) > 4 * 0.005 / 2, "the pauses grow"


def test_a_dead_hub_ends_in_one_error_in_time(location: str, server: LoopbackHub) -> None:
    server.away = True
    for failing in (
        lambda: list(read_rows(location, "text", patience=0.3)),
        lambda: find_files(f"{hub.SCHEME}{DATASET}/{FOLDER}/c4-*", patience=0.3),
        lambda: hash_file("name", location, patience=0.3),
    ):
        started = time.monotonic()
        with pytest.raises(ValueError, match=r"^hub: allenai/c4: nothing from http://127") as error:
            failing()
        assert 0.25 < time.monotonic() - started < 1
        message = str(error.value)
        assert "\n" not in message
        assert "for 0.3 s (hub_patience_seconds; last: " in message
        assert "offline: `hf download allenai/c4 --repo-type dataset --include 'en/" in message


def test_a_hub_that_answers_no_is_not_asked_again(
    server: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"allenai/c5: http\S+ says 401 .* check the id"):
        find_files(f"{hub.SCHEME}allenai/c5/en/*.json.gz")
    assert len(server.requests) == 1
    (server.root / DATASET / "en").mkdir(parents=True)
    (server.root / DATASET / "en" / "README.md").write_text("about")
    with pytest.raises(ValueError, match=r"no file of allenai/c4 at commit 0123456789ab matches"):
        find_files(f"{hub.SCHEME}{DATASET}/en/*.parquet")
    with pytest.raises(ValueError, match=r"has no file of \.txt"):
        find_files(f"{hub.SCHEME}{DATASET}/en")
    with pytest.raises(ValueError, match=r"write hf://datasets/OWNER/NAME/PATTERN"):
        find_files("hf://allenai/c4")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; unset it, or work offline"):
        find_files(f"{hub.SCHEME}{DATASET}/en/README.md")


def test_a_broken_download_goes_on_where_it_was_and_is_checked(
    location: str, server: LoopbackHub
) -> None:
    original = server.root / DATASET / hub.parse(location).path
    server.faults = ["", "cut"] + ["gone"] * 1000
    with pytest.raises(ValueError, match="nothing from"):
        hash_file("name", location, patience=0.3)
    server.faults, server.requests = [], []
    fetched = hash_file("name", location)
    assert Path(fetched.path).read_bytes() == original.read_bytes()
    assert fetched.bytes == original.stat().st_size
    ranges = [path for path in server.requests if "/resolve/" in path]
    assert len(ranges) < -(-fetched.bytes // 4096), "the first block was not asked for again"
    server.away = True
    assert hash_file("name", location) == fetched, "what is here needs no hub"
    server.away = False
    Path(fetched.path).rename(f"{fetched.path}.partial")
    with open(f"{fetched.path}.partial", "r+b") as partial:
        partial.write(b"X")
    with pytest.raises(ValueError, match=r"the hub lists .* was removed: run the same command"):
        hash_file("name", location)
    assert hash_file("name", location) == fetched
