"""Rows of operators come one by one, are kept, and do not wait for a compiler for ever."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from evals.throughput import op_bst_layer, ops
from evals.throughput.compile_limit import NotCompiledError, compile_limit
from evals.throughput.device_time import DeviceTime
from evals.throughput.op_jobs import Job
from evals.throughput.op_rows import OpRow

SLOW = "block_recurrent, compiled"


def spin() -> None:
    while True:
        pass


def test_a_compilation_ends_when_its_time_is_over() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(NotCompiledError, match=r"not compiled within 0\.01 s"), compile_limit(0.01):
        spin()
    with compile_limit(60):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before


def run(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    lengths: str,
    measure: Callable[[OpRow], list[OpRow]],
) -> list[OpRow]:
    """`bst_layer` with a layer of each kind and a compiled one; the rows that were measured."""
    measured = []

    def jobs(
        options: op_bst_layer.BSTLayerOptions, lengths: list[int], device: torch.device
    ) -> Iterator[Job]:
        for length in lengths:
            for form in ("bst", "block_recurrent", SLOW):
                row = OpRow(form, length, options.batch_size)

                def work(row: OpRow = row) -> list[OpRow]:
                    measured.append(row)
                    return measure(row)

                yield Job(row, work)

    monkeypatch.setitem(ops.OPS, "bst_layer", (op_bst_layer.BSTLayerOptions, jobs))
    assert ops.main(["bst_layer", f"lengths={lengths}", "device=cpu", f"out={folder}"]) == 0
    return measured


def timed(row: OpRow) -> list[OpRow]:
    ms = 1.0 if row.form == "bst" else 3.0
    return [row._replace(forward=DeviceTime(ms, ms, ms, "host"), error=0.1)]


def late(row: OpRow) -> list[OpRow]:
    if row.form == SLOW:
        with compile_limit(0.01):
            spin()
    return timed(row)


def verdicts(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """By the number of tokens, in the order of their lines above the table."""
    output = capsys.readouterr().out
    lines = output[: output.index("| form |")].splitlines()
    return [line.split(" tokens: ")[0] for line in lines if "3.00 times as fast" in line]


def test_each_length_has_its_verdict_though_one_form_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path, "16,32", late)
    assert verdicts(capsys) == ["- 16", "- 32"]
    rows = json.loads((tmp_path / "bst_layer.json").read_text())["rows"]
    notes = [row["note"] for row in rows if row["form"] == SLOW]
    assert notes == ["not compiled within 0.01 s", "not compiled at fewer tokens"]


def test_a_second_call_goes_on_where_the_first_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(row: OpRow) -> list[OpRow]:
        if row.length == 32 and row.form == "block_recurrent":
            raise KeyboardInterrupt
        return late(row)

    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, "16,32", interrupted)
    assert "3.00 times" in capsys.readouterr().out
    again = run(monkeypatch, tmp_path, "16,32", timed)
    wanted = [(SLOW, 16), ("block_recurrent", 32), (SLOW, 32)]
    assert [(row.form, row.length) for row in again] == wanted
    rows = json.loads((tmp_path / "bst_layer.json").read_text())["rows"]
    assert all(row["forward"]["ms"] in (1.0, 3.0) for row in rows)
    assert len(rows) == 6
    assert run(monkeypatch, tmp_path, "32", timed) == []
