"""Documents from files: txt, jsonl (plain, .gz, .xz, .zst) and parquet, here or on the hub.

A place is a file, a folder, a glob, or `hf://datasets/OWNER/NAME[@REVISION]/PATTERN` (data/hub.py).
A row is a line of a jsonl file, a row of a parquet file, or a whole txt file; files that end in
.json hold lines, too, as C4's do. `#bytes=START-STOP` behind a place takes that part of the text of
a file with a single row: enwik8 is split like this.

For preparation a source is planned once: every file is hashed (one of the hub is fetched first) and
cut into *units*, fixed row ranges of about `unit_bytes` of text. The plan depends on the files'
content alone, so the shards that follow from it do too, whatever the number of processes.
"""

import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from data import hub

COMPRESSIONS = (".gz", ".xz", ".zst")
FORMATS = (".txt", ".jsonl", ".json", ".parquet")
PARQUET_BATCH_ROWS = 64  # Books of 400 kB: a row group of a thousand would be half a gigabyte.
PART = re.compile(r"(?P<path>.+)#bytes=(?P<start>\d+)-(?P<stop>\d+)")


class Document(NamedTuple):
    """One row: its text, and its index inside its file."""

    text: str
    row: int


@dataclass(frozen=True)
class SourceFile:
    """One input file; `name` is its path below the folder or glob it was found by."""

    name: str
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Unit:
    """A fixed row range [start, stop) of a file; the work behind exactly one shard.

    `offset` is the byte at which row `start` begins, for formats that can seek; else 0.
    """

    path: str
    name: str
    start: int
    stop: int
    offset: int
    text_bytes: int


def find_files(
    location: str | list[str],
    patience: float = hub.PATIENCE_SECONDS,
    commits: dict[str, str] | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> list[tuple[str, str]]:
    """(name, path) of every file of a place, or of a list of places, sorted by name.

    A path on the hub names the commit that its revision points to now.

    Args:
        location: files, folders, globs and hf:// addresses.
        patience: seconds to wait for a hub that is away.
        commits: what "OWNER/NAME@REVISION" was found to be; used, and added to.
        formats: that the caller reads.

    Raises:
        ValueError: nothing is there, a file's format is not known, or the hub is away.
    """
    found: dict[str, str] = {}
    for whole in [location] if isinstance(location, str) else location:
        place, part = _without_part(whole)
        if hub.is_remote(place):
            remote = hub.find(place, patience, commits)
            known = [
                pair for pair in remote if format_of(pair[1], formats) is not None
            ]  # No README.
            if not known:
                raise ValueError(f"data: {place!r} has no file of {', '.join(formats)}")
            for name, path in known:
                _add(found, name + part, path + part, formats)
            continue
        if os.path.isdir(place):
            root = place
            paths = [
                os.path.join(folder, name)
                for folder, _, names in os.walk(place)
                for name in names
                if format_of(name, formats) is not None
            ]
        else:
            paths = [path for path in glob.glob(place, recursive=True) if os.path.isfile(path)]
            root = os.path.dirname(place.split("*")[0].split("?")[0].split("[")[0])
        if not paths:
            raise ValueError(
                f"data: nothing at {place!r} (looked at {os.path.abspath(place)}); give a file, "
                f"folder or glob of {', '.join(formats)}, all but parquet also with "
                f"{', '.join(COMPRESSIONS)}, or an address {hub.SCHEME}OWNER/NAME/PATTERN"
            )
        for path in paths:
            name = os.path.relpath(path, root or ".").replace(os.sep, "/")
            _add(found, name + part, path + part, formats)
    return sorted(found.items())


def _add(found: dict[str, str], name: str, path: str, formats: tuple[str, ...]) -> None:
    if format_of(path, formats) is None:
        raise ValueError(
            f"data: {path!r} has no known format; known: {', '.join(formats)}, "
            f"all but parquet also with {', '.join(COMPRESSIONS)}"
        )
    if found.setdefault(name, path) != path:
        raise ValueError(f"data: {path!r} and {found[name]!r} have the same name; rename one")


def hash_file(name: str, path: str, patience: float = hub.PATIENCE_SECONDS) -> SourceFile:
    """Reads a file once for its sha256; one of the hub is fetched, and the copy takes its place.

    Raises:
        ValueError: it cannot be read, or is a Git LFS pointer instead of its data.
    """
    path, part = _without_part(path)
    if hub.is_remote(path):
        path = hub.fetch(path, patience)
    try:
        with open(path, "rb") as stream:
            head = stream.read(64)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        size = os.path.getsize(path)
    except OSError as error:
        raise ValueError(f"data: {path!r} cannot be read ({error.strerror})") from error
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"data: {path!r} is a Git LFS pointer; run `git lfs pull` to get its data")
    return SourceFile(name, path + part, size, digest)


def plan_units(file: SourceFile, unit_bytes: int, text_field: str) -> list[Unit]:
    """Cuts a file into row ranges of about `unit_bytes` of raw content."""
    kind = format_of(file.path)
    if match := PART.fullmatch(file.path):
        return [Unit(file.path, file.name, 0, 1, 0, int(match["stop"]) - int(match["start"]))]
    if kind == ".txt":
        return [Unit(file.path, file.name, 0, 1, 0, file.bytes)]
    if kind == ".parquet":
        groups = _row_group_sizes(file.path, text_field)
        return _cut(file, groups, unit_bytes, seekable=False)
    seekable = not file.path.endswith(COMPRESSIONS)
    with (
        _naming(file.path),
        open(file.path, "rb") as stream,
        _decompressed(file.path, stream) as lines,
    ):
        sizes = np.fromiter((len(line) for line in lines), np.int64)
    rows = zip(itertools.repeat(1), map(int, sizes), strict=False)
    return _cut(file, rows, unit_bytes, seekable=seekable)


def read_unit(unit: Unit, text_field: str) -> Iterator[Document]:
    """The documents of a unit, in order.

    Raises:
        ValueError: naming the file and row that is damaged or lacks `text_field`.
    """
    yield from read_rows(unit.path, text_field, range(unit.start, unit.stop), unit.offset)


def read_rows(
    path: str,
    text_field: str,
    rows: range = range(sys.maxsize),
    offset: int = 0,
    patience: float = hub.PATIENCE_SECONDS,
) -> Iterator[Document]:
    """The documents of some rows of a file, in order. Reading begins as near to them as it can.

    Args:
        path: a file, here or on the hub.
        text_field: column that holds the text; several, joined by commas, are joined by newlines.
        rows: which rows; may reach behind the last one.
        offset: byte at which row `rows.start` begins, if known.
        patience: seconds to wait for a hub that is away.

    Raises:
        ValueError: naming the file and row that is damaged or lacks `text_field`, or the data set
            whose hub is away.
    """
    fields = text_field.split(",")
    if match := PART.fullmatch(path):
        (document,) = list(read_rows(match["path"], text_field, range(2), patience=patience))
        if document.row in rows:
            part = _bytes_of(document.text, int(match["start"]), int(match["stop"]))
            yield Document(part, document.row)
        return
    kind = format_of(path)
    with open_content(path, patience) as content:
        if kind == ".parquet":
            yield from _read_parquet(path, content, fields, rows)
        elif kind == ".txt":
            if 0 in rows:
                yield Document(_decode(content.read(), f"{path!r}"), 0)
        else:
            yield from _read_jsonl(path, content, fields, rows, offset)


def _read_jsonl(
    path: str, lines: BinaryIO, fields: list[str], rows: range, offset: int
) -> Iterator[Document]:
    if offset:
        lines.seek(offset)
    for row, line in enumerate(lines, rows.start if offset else 0):
        if row >= rows.stop:
            break
        if row not in rows or not line.strip():
            continue
        where = f"{path!r} row {row}"
        yield Document(_text_of(parse_json(line, where), fields, where), row)


def parse_json(line: bytes, where: str) -> Any:
    """The value in a line of a jsonl file.

    Raises:
        ValueError: it is not UTF-8 or not JSON, naming the place.
    """
    try:
        return json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {where} is not JSON ({error}); repair or delete it") from error


def _read_parquet(
    path: str, stream: BinaryIO, fields: list[str], rows: range
) -> Iterator[Document]:
    with open_parquet(path, stream, fields) as table:
        first = 0  # Of the group, then of the batch.
        for group in range(table.num_row_groups):
            behind = first + table.metadata.row_group(group).num_rows
            if first >= rows.stop:
                break
            if behind <= rows.start:
                first = behind
                continue
            for batch in table.iter_batches(
                PARQUET_BATCH_ROWS, row_groups=[group], columns=fields, use_threads=False
            ):
                for row in range(first, first + batch.num_rows):
                    if row in rows:
                        record = {name: batch[name][row - first].as_py() for name in fields}
                        yield Document(_text_of(record, fields, f"{path!r} row {row}"), row)
                first += batch.num_rows


@contextmanager
def open_parquet(path: str, stream: BinaryIO, fields: list[str]) -> Iterator[Any]:
    """The pyarrow ParquetFile of a stream.

    Raises:
        ValueError: it is damaged or lacks one of the fields.
    """
    import pyarrow.parquet  # Here, because it is slow to import and few formats need it.

    try:
        table = pyarrow.parquet.ParquetFile(stream)
    except pyarrow.ArrowException as error:
        raise ValueError(f"data: {path!r} is not a readable parquet file ({error})") from error
    with table:
        columns = table.schema_arrow.names
        if missing := [name for name in fields if name not in columns]:
            raise ValueError(
                f"data: {path!r} has no column text_field={','.join(missing)!r}; "
                f"it has {', '.join(columns)}: set text_field"
            )
        yield table


def _row_group_sizes(path: str, text_field: str) -> list[tuple[int, int]]:
    """(rows, uncompressed bytes) of every row group."""
    with open(path, "rb") as stream, open_parquet(path, stream, text_field.split(",")) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _cut(
    file: SourceFile, sizes: Iterable[tuple[int, int]], unit_bytes: int, *, seekable: bool
) -> list[Unit]:
    """Joins consecutive (rows, bytes) until a unit holds `unit_bytes`."""
    units = []
    start = row = offset = position = 0
    for rows, size in sizes:
        row += rows
        position += size
        if position - offset >= unit_bytes:
            at = offset if seekable else 0
            units.append(Unit(file.path, file.name, start, row, at, position - offset))
            start, offset = row, position
    if row > start:
        at = offset if seekable else 0
        units.append(Unit(file.path, file.name, start, row, at, position - offset))
    return units


def _without_part(path: str) -> tuple[str, str]:
    """A path, and the `#bytes=` behind it or nothing."""
    match = PART.fullmatch(path)
    return (match["path"], path[len(match["path"]) :]) if match else (path, "")


def _bytes_of(text: str, start: int, stop: int) -> str:
    """Bytes [start, stop) of the UTF-8 form; either end moves on to where a character begins."""
    content = text.encode()

    def begin(i: int) -> int:
        while i < len(content) and content[i] & 0xC0 == 0x80:
            i += 1
        return i

    return content[begin(start) : begin(stop)].decode()


def format_of(path: str, formats: tuple[str, ...] = FORMATS) -> str | None:
    """Which of the formats a file's name says it has; None: none of them."""
    stem = _without_part(path)[0]
    kind = os.path.splitext(stem)[1]
    if kind in COMPRESSIONS:
        kind = os.path.splitext(stem.removesuffix(kind))[1]
        return kind if kind in formats and kind != ".parquet" else None
    return kind if kind in formats else None


@contextmanager
def open_content(path: str, patience: float = hub.PATIENCE_SECONDS) -> Iterator[BinaryIO]:
    """A file's decompressed content, here or on the hub.

    Raises:
        ValueError: it cannot be read, is damaged or cut off, or the hub is away.
    """
    with _naming(path), _open(path, patience) as stream, _decompressed(path, stream) as content:
        yield content


def _open(path: str, patience: float = hub.PATIENCE_SECONDS) -> BinaryIO:
    return hub.open_file(path, patience) if hub.is_remote(path) else open(path, "rb")


def _decompressed(path: str, stream: BinaryIO) -> BinaryIO:
    if path.endswith(".gz"):
        return cast(BinaryIO, gzip.open(stream, "rb"))
    if path.endswith(".xz"):
        return cast(BinaryIO, lzma.open(stream, "rb"))
    if path.endswith(".zst"):
        import pyarrow  # Unlike the zstandard package it notices a file that is cut off.

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(stream, compression="zstd")))
    return stream


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turns whatever reading a damaged file raises into one error that names it."""
    try:
        yield
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"data: {path!r} cannot be read, is damaged or cut off ({error}); fetch it again"
        ) from error


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {where} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv"
        ) from error


def _text_of(record: Any, fields: list[str], where: str) -> str:
    texts = []
    for name in fields:
        text = record.get(name) if isinstance(record, dict) else None
        if not isinstance(text, str):
            has = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise ValueError(
                f"data: {where} has no string text_field={name!r}; it has {has}: set text_field"
            )
        texts.append(text)
    whole = "\n".join(texts)
    try:
        whole.encode()
    except UnicodeEncodeError:
        # JSON can spell halves of surrogate pairs, which no encoding accepts: they become U+FFFD.
        whole = whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole
