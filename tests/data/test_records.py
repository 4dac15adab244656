"""Rows come with all columns, whatever the format, from here and from the hub."""

import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants
from loopback_hub import LoopbackHub

from data.records import read_records

ROWS = [{"text": 'a "quoted",\nbroken line', "label": "1"}, {"text": "Müller 船", "label": "0"}]
CSV = 'text,label\r\n"a ""quoted"",\nbroken line",1\r\nMüller 船,0\r\n'


def values(location):
    return [record.values for record in read_records(str(location))]


def test_formats_agree(tmp_path):
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    (tmp_path / "b.csv").write_text(CSV, encoding="utf-8", newline="")
    (tmp_path / "c.csv.xz").write_bytes(lzma.compress(CSV.encode("utf-8-sig")))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for name in ("a.jsonl.xz", "b.csv", "c.csv.xz", "d.parquet"):
        assert values(tmp_path / name) == ROWS
    assert values(tmp_path) == 4 * ROWS
    assert [record.where for record in read_records(str(tmp_path / "b.csv"))] == [
        "b.csv row 0",
        "b.csv row 1",
    ]


def test_columns_keep_their_types(tmp_path):
    row = {"label": 1, "score": 2.5, "sentences": ["one", "two"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert values(tmp_path / "a.jsonl") == values(tmp_path / "a.parquet") == [row]


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a.jsonl' row 1 is not JSON"):
        values(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"b.jsonl row 0 holds list, not an object"):
        values(tmp_path / "b.jsonl")
    (tmp_path / "c.csv").write_text('text\n"never closed')
    with pytest.raises(ValueError, match=r"c.csv' is not a readable csv file"):
        values(tmp_path / "c.csv")
    (tmp_path / "d.csv.xz").write_bytes(lzma.compress(CSV.encode())[:-20])
    with pytest.raises(ValueError, match=r"d.csv.xz' cannot be read, is damaged or cut off"):
        values(tmp_path / "d.csv.xz")


def test_rows_of_the_hub_are_those_of_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "hub/nyu-mll/glue/sst2"
    folder.mkdir(parents=True)
    rows = [{"sentence": f"text {i}", "label": i % 2, "idx": i} for i in range(20)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=7)
    server = LoopbackHub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    try:
        assert values("hf://datasets/nyu-mll/glue/sst2/train-*.parquet") == rows
    finally:
        server.close()
