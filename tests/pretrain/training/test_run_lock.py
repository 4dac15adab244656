"""A run directory has one training at a time."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.training.run_lock import lock_run

HOLD = """
import sys, time
from pathlib import Path
from pretrain.training.run_lock import lock_run
lock_run(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=f"name={tmp_path.name}: another process trains"):
                lock_run(tmp_path, seconds=0.1)
        finally:
            other.kill()
    assert lock_run(tmp_path, seconds=5) is None
    assert lock_run(tmp_path) is None  # of the same process


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert "cannot be locked (No locks available)" in (lock_run(tmp_path) or "")
