"""Measurements are kept, and one that hangs or crashes is a row like any other."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evals.throughput import processes
from evals.throughput.machine import Machine
from tests.evals.throughput.tiny import measurement

MACHINE = Machine("a processor", "", "", "2", "3", "an OS", "unknown")
# Called as PROGRAM -m MODULE JOB ANSWER.
ANSWER = """echo 'phase 0.1 s  timing'; echo '{"status": "STATUS", "at": "'$$'"}' > $4"""
HANG = "echo 'phase 0.1 s  choosing kernels'; sleep 60"
CRASH = "echo 'phase 0.1 s  building'; echo 'no such kernel' >&2; exit 3"


def worker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a shell script in the worker's place."""
    path = folder / "worker.sh"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


@pytest.mark.parametrize("status", ["ok", "out of memory"])
def test_a_result_is_used_again_where_all_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    worker(tmp_path, monkeypatch, ANSWER.replace("STATUS", status))
    m = measurement(tmp_path)
    first = processes.result_of(m, tmp_path, MACHINE, 10)
    assert first["status"] == status
    assert processes.result_of(m, tmp_path, MACHINE, 10) == first
    other_length = measurement(tmp_path, length=64)
    assert processes.result_of(other_length, tmp_path, MACHINE, 10)["at"] != first["at"]
    (tmp_path / "tiny.yaml").write_text(
        (tmp_path / "tiny.yaml").read_text().replace("window_size: 16", "window_size: 8")
    )
    assert processes.result_of(m, tmp_path, MACHINE, 10)["at"] != first["at"]


def test_another_device_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(tmp_path, monkeypatch, ANSWER.replace("STATUS", "ok"))
    m = measurement(tmp_path)
    first = processes.result_of(m, tmp_path, MACHINE, 10)
    other = Machine("another", *list(vars(MACHINE).values())[1:])
    assert processes.result_of(m, tmp_path, other, 10)["at"] != first["at"]


def test_what_hangs_is_ended_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    worker(tmp_path, monkeypatch, HANG)
    m = measurement(tmp_path)
    result = processes.result_of(m, tmp_path, MACHINE, 0.5)
    assert result["status"].startswith("timed out after 0.5 s, while choosing kernels")
    assert "0.1 s  choosing kernels" in capfd.readouterr().out
    worker(tmp_path, monkeypatch, ANSWER.replace("STATUS", "ok"))
    assert processes.result_of(m, tmp_path, MACHINE, 10)["status"] == "ok"


def test_each_kind_is_compiled_once_before_and_what_is_measured_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    note = f"cat $3 >> {tmp_path}/jobs; echo >> {tmp_path}/jobs; "
    worker(tmp_path, monkeypatch, note + """echo '{"status": "ok", "ready_seconds": 7}' > $4""")
    short, long = (measurement(tmp_path, compile=True, length=length) for length in (32, 64))
    eager = measurement(tmp_path, length=16)
    processes.result_of(long, tmp_path, MACHINE, 10)
    (tmp_path / "jobs").unlink()
    others = replace(short, loop="trainer"), replace(short, loop="deepspeed", zero_stage=0)
    every = [short, *others, long, eager]
    processes.compile_all(every, tmp_path, MACHINE, 10, workers=2)
    (job,) = map(json.loads, (tmp_path / "jobs").read_text().split("\n\n")[:-1])
    assert (job["settings"]["length"], job["compile_only"]) == (32, True)
    assert "tiny, 2 x 32 tokens: 7 s" in capfd.readouterr().out
    assert len([*(tmp_path / "measurements").glob("*.json")]) == 1  # nothing counts as measured


def test_what_crashes_says_where_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(tmp_path, monkeypatch, CRASH)
    result = processes.result_of(measurement(tmp_path), tmp_path, MACHINE, 10)
    assert result["status"].startswith("failed with code 3 while building: no such kernel")


def test_the_dot_of_a_size_does_not_end_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(tmp_path, monkeypatch, ANSWER.replace("STATUS", "ok"))
    m = measurement(tmp_path, model="bst_1.3b", length=512)
    assert processes.result_of(m, tmp_path, MACHINE, 10)["name"] == "bst_1.3b"
    (path,) = (tmp_path / "measurements").glob("*.json")
    assert path.name.startswith("bst_1.3b-plain-512x2-")
