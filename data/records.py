"""Rows of files with all of their columns, for tasks: jsonl, csv and parquet, here or on the hub.

data/sources.py reads one text per row, by row ranges and fast; tasks need labels and lists, too,
and are small.
"""

import csv
import io
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from data import hub
from data.sources import (
    PARQUET_BATCH_ROWS,
    find_files,
    format_of,
    open_content,
    open_parquet,
    parse_json,
)

FORMATS = (".jsonl", ".json", ".csv", ".parquet")


class Record(NamedTuple):
    """A row; `where` names its file and its index in it."""

    where: str
    values: dict[str, Any]


def read_records(
    location: str | list[str], patience: float = hub.PATIENCE_SECONDS
) -> Iterator[Record]:
    """All rows of a place (data/sources.py says what that is), file by file by name.

    A csv file has its columns' names in its first row.

    Raises:
        ValueError: nothing is there, or naming the file, or its row, that is damaged.
    """
    for name, path in find_files(location, patience, formats=FORMATS):
        for row, values in enumerate(_rows(path, patience)):
            where = f"{name} row {row}"
            if not isinstance(values, dict):
                raise ValueError(
                    f"data: {where} holds {type(values).__name__}, not an object with fields; "
                    "write one JSON object per line"
                )
            yield Record(where, values)


def _rows(path: str, patience: float) -> Iterator[Any]:
    kind = format_of(path, FORMATS)
    with open_content(path, patience) as content:
        if kind == ".parquet":
            with open_parquet(path, content, []) as table:
                for batch in table.iter_batches(PARQUET_BATCH_ROWS):
                    yield from batch.to_pylist()
        elif kind == ".csv":
            csv.field_size_limit(sys.maxsize)  # By default a field ends at 131,072 characters.
            text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
            try:
                yield from csv.DictReader(text, strict=True)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"data: {path!r} is not a readable csv file ({error})") from error
        else:
            for row, line in enumerate(content):
                if line.strip():
                    yield parse_json(line, f"{path!r} row {row}")
