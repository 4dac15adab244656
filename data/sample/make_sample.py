"""Cuts the bundled sample out of a folder of public-domain novels; see SOURCE.md beside this file.

    python data/sample/make_sample.py FOLDER

FOLDER holds `train.jsonl.xz` and `validation.jsonl.xz`, one novel per line with the fields
short_book_title ("AUTHOR TITLE-WORD"), publication_date, text and source_sha256. Nothing is random:
the same folder and the same liblzma give the same bytes.
"""

import json
import lzma
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

BUDGET_BYTES = 5_950_000  # Both files together, compressed.
VALIDATION_BOOKS = 24  # Confidence intervals are clustered by document, so documents must be many.
EXCERPT_BYTES = 250_000  # 62,500 tokens at 4 bytes per token.
FRONT_MATTER = 0.02  # Share of a book that may be title page, dedication and table of contents.


def read_novels(folder: Path) -> list[dict[str, Any]]:
    """All novels of `folder`, by author and year, with LF line ends."""
    novels = []
    for name in ("train.jsonl.xz", "validation.jsonl.xz"):
        with lzma.open(folder / name, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                record = json.loads(line)
                author, title = record["short_book_title"].split(" ", 1)
                novels.append(
                    {
                        "title": title,
                        "author": author,
                        "year": record["publication_date"],
                        "text": record["text"].replace("\r\n", "\n"),
                        "source_sha256": record["source_sha256"],
                    }
                )
    return sorted(novels, key=lambda novel: (novel["author"], novel["year"], novel["title"]))


def excerpt(text: str) -> str:
    """The first EXCERPT_BYTES behind the front matter, from paragraph to paragraph."""
    start = text.index("\n", int(FRONT_MATTER * len(text)))
    body = text[start:].lstrip("\n")
    stop = len(body.encode()[:EXCERPT_BYTES].decode(errors="ignore"))
    paragraph = body.find("\n", stop)
    return body if paragraph < 0 else body[: paragraph + 1]


def compress(novels: list[dict[str, Any]]) -> bytes:
    lines = "".join(json.dumps(novel, ensure_ascii=False) + "\n" for novel in novels)
    return lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)


def choose(
    novels: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Excerpts of one book of each of the authors with most books; the other books, in turns."""
    shelves = defaultdict(list)
    for novel in novels:
        shelves[novel["author"]].append(novel)
    # An author with one book only would be lost to training; ties go by name.
    authors = sorted(shelves, key=lambda author: (-len(shelves[author]), author))
    validation: list[dict[str, Any]] = []
    for author in authors:
        enough = [n for n in shelves[author] if len(excerpt(n["text"]).encode()) >= EXCERPT_BYTES]
        if enough and len(validation) < VALIDATION_BOOKS:
            # The shortest that suffices: the longest books stay whole, for training.
            book = min(enough, key=lambda novel: len(novel["text"]))
            shelves[author].remove(book)
            validation.append(book | {"text": excerpt(book["text"])})
    rest = []
    while any(shelves.values()):
        # The shortest book of every author, shortest first: as many authors as the budget holds.
        shelf_ends = [
            min(shelf, key=lambda n: len(n["text"])) for shelf in shelves.values() if shelf
        ]
        for novel in sorted(shelf_ends, key=lambda n: len(n["text"])):
            shelves[novel["author"]].remove(novel)
            rest.append(novel)
    return validation, rest


def main(folder: Path) -> None:
    here = Path(__file__).parent
    validation, candidates = choose(read_novels(folder))
    packed_validation = compress(validation)
    budget = BUDGET_BYTES - len(packed_validation)

    fits, too_many = 0, len(candidates) + 1
    while too_many - fits > 1:  # The longest prefix of `candidates` that stays within the budget.
        middle = (fits + too_many) // 2
        if len(compress(candidates[:middle])) <= budget:
            fits = middle
        else:
            too_many = middle
    train = candidates[:fits]

    (here / "train.jsonl.xz").write_bytes(compress(train))
    (here / "validation.jsonl.xz").write_bytes(packed_validation)
    for split, books in (("train", train), ("validation", validation)):
        size = (here / f"{split}.jsonl.xz").stat().st_size
        raw = sum(len(book["text"].encode()) for book in books)
        authors = len({book["author"] for book in books})
        print(f"{split}: {len(books)} books of {authors} authors, {raw:,} bytes, packed {size:,}")
        for book in books:
            print(
                f"  {book['author']} {book['title']} {book['year']} {len(book['text'].encode()):,}"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
