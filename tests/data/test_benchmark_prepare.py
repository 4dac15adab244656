from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest

from data.benchmark_prepare import FORMS, Measurement, main


def test_every_form_is_measured_with_the_same_text(
    source: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([f"text={source}", "megabytes=0.2", "tokenizer=unigram", "vocab_size=330"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == [f"| {form}" for form in FORMS]
    assert {row[3] for row in rows} == {"0.2"}
    assert all(float(row[5]) > 0 for row in rows)


def test_scaling_is_the_speed_per_worker_of_what_one_does() -> None:
    one = Measurement("txt", 1, 0, 6_000_000, 0, 2.0, 2.0)
    four = Measurement("txt", 4, 0, 24_000_000, 0, 4.0, 8.0)
    assert [m.row(one).split(" | ")[5:7] for m in (one, four)] == [["3.0", "100%"], ["6.0", "50%"]]
    assert four.row(None).split(" | ")[6] == "-"


def test_a_text_without_any_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n' * 3)
    assert main([f"text={empty}"]) == 2
    assert capsys.readouterr().err == (
        f"benchmark_prepare: text={empty}: no document has any text; give another file\n"
    )


def test_a_pyarrow_without_zstd_is_noticed_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = SimpleNamespace(is_available=lambda name: name != "zstd")
    monkeypatch.setattr(pyarrow, "Codec", codec)
    assert main(["forms=jsonl,jsonl.zst"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("benchmark_prepare: forms=jsonl.zst: this pyarrow is built")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("form=jsonl", "form=jsonl: not known; did you mean forms=?"),
        ("forms=csv", "forms=csv: unknown; known: jsonl, jsonl.gz"),
        ("workers=many", "workers=many: must be whole numbers with commas between, e.g. 1,2,4"),
        ("megabytes=much", "megabytes=much: must be a number"),
    ],
)
def test_bad_input_is_one_clear_line(
    word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err.startswith(f"benchmark_prepare: {message}")
