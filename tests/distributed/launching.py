"""Starts real `deepspeed` and plain `python` processes for tests, and reads what they left."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.distributed.tiny_run import Run

REPOSITORY = Path(__file__).resolve().parents[2]
TINY_RUN = Path(__file__).with_name("tiny_run.py")
# Where one of several processes gets SIGKILL, deepspeed's launcher ends with the code of the first
# dead one that it meets, in any order: 256 - 9, or that of another, which lost its peer.
KILLED = (247, 1)
TIMEOUT = 280  # seconds; launches take 10 to 30 on two idle cores


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(script: Path, arguments: list[str], *, processes: int) -> subprocess.Popen[str]:
    """Starts `script` under the deepspeed launcher, or plainly for one process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes)]
        command += ["--master_port", str(free_port())]
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {key: value for key, value in os.environ.items() if key not in dropped}
    return subprocess.Popen(
        [*command, str(script), *arguments],
        cwd=REPOSITORY,
        env={
            **inherited,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits; returns exit code and output. Kills the whole session after TIMEOUT."""
    before = shared_memory_files()
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {TIMEOUT} s:\n{output[-4000:]}") from None
    left = shared_memory_files() - before
    assert not left, f"left in /dev/shm: {left}"
    return process.returncode, output


def shared_memory_files() -> set[str]:
    """DeepSpeed's all-reduce buffers, 69 MB each where they are not prevented."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.glob("deepspeed_*")} if folder.is_dir() else set()


def start_runs(folder: Path, runs: list[Run], *, processes: int) -> subprocess.Popen[str]:
    """Starts tiny_run.py on `runs`, one after another in one process group."""
    return start(TINY_RUN, [str(_specification(folder, runs))], processes=processes)


def train(
    folder: Path, runs: list[Run], *, processes: int, code: int | tuple[int, ...] = 0
) -> list[dict[str, Any]]:
    """Trains `runs` and checks the exit code, which may be one of several.

    Returns:
        For each run the `code` and error `message` that it would have ended with on its own; empty
        when the launch was killed.
    """
    specification = _specification(folder, runs)
    returned, output = finish(start(TINY_RUN, [str(specification)], processes=processes))
    expected = code if isinstance(code, tuple) else (code,)
    assert returned in expected, f"exit code {returned}:\n{output[-6000:]}"
    outcomes = specification.with_suffix(".outcomes")
    return json.loads(outcomes.read_text()) if outcomes.exists() else []


def _specification(folder: Path, runs: list[Run]) -> Path:
    path = folder / f"runs_{len(list(folder.glob('runs_*.json')))}.json"
    path.write_text(json.dumps([asdict(run) for run in runs]))
    return path


def rows_of(run: Run, key: str) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that hold `key`."""
    path = Path(run.out_dir) / run.name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if key in row]


def trajectory(run: Run) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    rows = rows_of(run, "loss")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [(row["loss"], row["grad_norm"]) for row in rows]


def checkpoints(run: Run) -> Path:
    return Path(run.out_dir) / run.name / "checkpoints"


def largest_difference(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> float:
    """Largest relative difference of any loss or norm; both must have all steps."""
    assert len(ours) == len(theirs)
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return max(abs(x - y) / abs(y) for x, y in pairs)
