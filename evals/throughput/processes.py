"""Measurements one after another, each in its own process, each kept as a file.

A result is used again where everything it depends on is the same (`Measurement.identity`), whether
it is a number or "out of memory". What hung, crashed or was not installed is tried anew.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals.throughput.machine import Machine
from evals.throughput.settings import Measurement
from evals.throughput.worker import PHASE
from pretrain.training.environment import REPOSITORY
from pretrain.training.manifest import write_json

LASTING = ("ok", "out of memory")
POLL_SECONDS = 0.1

Result = dict[str, Any]


def result_of(m: Measurement, out_dir: Path, machine: Machine, timeout_seconds: float) -> Result:
    """The measurement's result, from `out_dir` or from a process.

    Returns:
        `status` ("ok", or what happened), `settings`, `machine`, and of an "ok" one what
        `worker.measure` returns.
    """
    identity = m.identity(machine.device)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{m.name}-{m.loop}-{m.length}x{m.batch_size}-{digest}"
    path = out_dir / "measurements" / f"{name}.json"
    title = f"{m.name}, {m.loop}, {m.batch_size} x {m.length:,} tokens, {m.precision}"
    if path.exists():
        print(f"{title}: measured before", flush=True)
        found: Result = json.loads(path.read_text(encoding="utf-8"))
        return found
    print(title, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "name": m.name,
        "settings": asdict(m),
        "machine": asdict(machine),
        "identity": identity,
    }
    result |= _run(m, path, timeout_seconds)
    if result["status"] in LASTING:
        write_json(path, result)
    print(f"  {result['status']}", flush=True)
    return result


def _run(m: Measurement, path: Path, timeout_seconds: float) -> Result:
    """Runs the worker, shows its phases, and ends it and its children when its time is over."""
    job, answer, log = (path.with_suffix(suffix) for suffix in (".job", ".answer", ".log"))
    write_json(job, {"settings": asdict(m), "timeout_seconds": timeout_seconds})
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "evals.throughput.worker", str(job), str(answer)]
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    deadline, shown, phase = time.monotonic() + timeout_seconds, 0, "starting"
    # Output goes to a file: a pipe stays open as long as a compiler's process lives on.
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        running = True
        while running:
            running = process.poll() is None and time.monotonic() < deadline
            lines = [line for line in _lines(log) if line.startswith(PHASE)]
            for line in lines[shown:]:
                phase = line.removeprefix(PHASE).split("s  ", 1)[1]
                print(f"  {line.removeprefix(PHASE).strip()}", flush=True)
            shown = len(lines)
            time.sleep(POLL_SECONDS if running else 0)
        code = process.poll()
    finally:
        _end(process)
    job.unlink()
    if code == 0:
        result: Result = json.loads(answer.read_text(encoding="utf-8"))
        answer.unlink()
        return result
    if code is None:
        return {"status": f"timed out after {timeout_seconds:g} s, while {phase}; stacks in {log}"}
    last = next(reversed(_lines(log)), "")
    return {"status": f"failed with code {code} while {phase}: {last.strip()[:200]} (see {log})"}


def _lines(log: Path) -> list[str]:
    text = log.read_text(encoding="utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()  # a line may be half written


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and the children it left, which would go on using the device."""
    with contextlib.suppress(ProcessLookupError):  # the whole group is gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
