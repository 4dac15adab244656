"""Measurements one after another, each in its own process, each kept as a file.

A result is used again where everything it depends on is the same (`Measurement.identity`), whether
it is a number or "out of memory". What hung, crashed or was not installed is tried anew.

Compiling takes most of the time and no GPU to speak of: beforehand, several processes side by side
may fill torch's cache on disk, in which the measurements then find their blocks.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evals.throughput.machine import Machine
from evals.throughput.settings import Measurement
from evals.throughput.worker import PHASE
from pretrain.files import write_json
from pretrain.training.environment import REPOSITORY

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
    path = _path(m, out_dir, machine)
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
    result |= _run(m, path, timeout_seconds, lambda line: print(f"  {line}", flush=True))
    if result["status"] in LASTING:
        write_json(path, result)
    return result


def compile_all(
    measurements: Iterable[Measurement],
    out_dir: Path,
    machine: Machine,
    timeout_seconds: float,
    workers: int,
) -> None:
    """Compiles what is not measured yet, each kind of block once, `workers` processes at a time.

    What goes wrong here goes wrong again in the measurement, which says so.
    """
    # Loops differ in nothing that is compiled; a plain one needs no process group.
    wanted = dict.fromkeys(
        replace(m, loop="plain", profile="", zero_stage=Measurement.zero_stage)
        for m in measurements
        if m.compile and not _path(m, out_dir, machine).exists()
    )
    threads = str(max(1, (os.cpu_count() or 1) // workers))

    def compile_one(m: Measurement) -> str:
        path = out_dir / "compiled" / _path(m, out_dir, machine).name
        path.parent.mkdir(parents=True, exist_ok=True)
        result = _run(m, path, timeout_seconds, lambda line: None, compile_threads=threads)
        took = f"{result['ready_seconds']:.0f} s" if "ready_seconds" in result else result["status"]
        return f"{m.name}, {m.batch_size} x {m.length:,} tokens: {took}"

    print(f"compiling {len(wanted)} models, {workers} at a time", flush=True)
    with ThreadPoolExecutor(workers) as pool:
        for line in pool.map(compile_one, wanted):
            print(f"  {line}", flush=True)


def _path(m: Measurement, out_dir: Path, machine: Machine) -> Path:
    identity = json.dumps(m.identity(machine.device), sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    name = f"{m.name}-{m.loop}-{m.length}x{m.batch_size}-{digest}"
    return out_dir / "measurements" / f"{name}.json"


def _run(
    m: Measurement,
    path: Path,
    timeout_seconds: float,
    show: Callable[[str], None],
    *,
    compile_threads: str = "",
) -> Result:
    """Runs the worker, shows its phases, and ends it and its children when its time is over; with
    `compile_threads` it measures nothing and compiles with so many."""
    job, answer, log = (path.with_suffix(suffix) for suffix in (".job", ".answer", ".log"))
    write_json(
        job,
        {
            "settings": asdict(m),
            "timeout_seconds": timeout_seconds,
            "compile_only": bool(compile_threads),
        },
    )
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "evals.throughput.worker", str(job), str(answer)]
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",  # on disk, as torch's; else 2 s per kernel
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    if compile_threads:
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = compile_threads
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
                show(line.removeprefix(PHASE).strip())
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
