"""Trains many small runs on one machine, some at a time: every combination of the values given.

    python launch/sweep.py experiment=rows model=swa_tiny,bst_tiny seed=0,1,2 workers=6 \\
        optim.learning_rate=1.5e-3,3e-3 out_dir=runs/rows
    python launch/sweep.py sweep=rows workers=12 [KEY=VALUE ...] [dry_run=true]

Arguments are those of launch/train.py; one with several values, divided by commas, is varied, and
names the run: runs/rows/bst_tiny_seed0_learning_rate3e-3. `sweep` picks a file of configs/sweep/, a
list of such argument sets (lists are varied) that may differ in more than one key; the command line
is laid over each. `dry_run=true` prints the commands.

Each run is a process of one thread; several share a GPU, and of several GPUs each run takes the one
with the fewest. Output goes to RUN/sweep.log. A run that fails stops no other. The same command
resumes what is unfinished; SIGTERM and Ctrl-C let every run save first. Exit codes: 0 all finished,
75 stopped before that, 2 bad arguments, 1 some runs failed.
"""

import contextlib
import difflib
import itertools
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import OmegaConf

from pretrain.config import CONFIG_DIR, SECTIONS, RunConfig, load_config
from pretrain.training.environment import visible_gpus

TRAIN = Path(__file__).with_name("train.py")
FINISHED, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
STOPPED_CODES = (STOPPED, -signal.SIGTERM)  # the second where it had not even begun
POLL_SECONDS = 0.1


@dataclass
class SweepRun:
    """One run: the arguments of its launch/train.py, and what they come to."""

    arguments: list[str]
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @property
    def log(self) -> Path:
        return self.run_dir / "sweep.log"


def expand(arguments: list[str], *, config_dir: Path = CONFIG_DIR) -> list[SweepRun]:
    """All runs of a sweep, in the order of the arguments, the last one varying fastest.

    Raises:
        ValueError: a file that is not there or is not a list of argument sets, nothing that
            varies, two runs of one name, a configuration that launch/train.py would refuse.
    """
    given: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise ValueError(f"argument '{argument}': write key=value, e.g. seed=0,1,2")
        values = split_values(text)
        given[key] = values if len(values) > 1 else text
    sets: list[dict[str, Any]] = [{}]
    if "sweep" in given:
        sets = _read_sweep(str(given.pop("sweep")), config_dir)
    runs: dict[Path, SweepRun] = {}
    for single in sets:
        for words in _combinations({**single, **given}):
            try:
                run = SweepRun(words, load_config(words, config_dir=config_dir))
            except ValueError as error:
                raise ValueError(f"{shlex.join(words)}: {error}") from error
            if run.run_dir in runs:
                raise ValueError(f"{run.run_dir}: two runs of this name; vary what differs in them")
            runs[run.run_dir] = run
    return list(runs.values())


def split_values(text: str) -> list[str]:
    """Divides at commas, except inside of brackets: betas=[0.9,0.95] is one value."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return values


def _combinations(choices: dict[str, Any]) -> list[list[str]]:
    """The arguments of each run of one argument set."""
    varied = {key: value for key, value in choices.items() if isinstance(value, list)}
    if not varied:
        raise ValueError("nothing varies: give a key several values, e.g. seed=0,1,2")
    fixed = [f"{key}={value}" for key, value in choices.items() if key not in (*varied, "name")]
    found = []
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        parts = [str(choices["name"])] if "name" in choices else []
        parts += [_name_part(key, str(value)) for key, value in chosen.items()]
        own = [f"{key}={value}" for key, value in chosen.items()]
        found.append([*fixed, *own, f"name={'_'.join(parts)}"])
    return found


def _name_part(key: str, value: str) -> str:
    """bst_tiny of model=bst_tiny, learning_rate3e-3 of optim.learning_rate=3e-3."""
    value = Path(value).stem if value.endswith((".yaml", ".yml")) else value
    return value if key in (*SECTIONS, "experiment") else f"{key.rsplit('.', 1)[-1]}{value}"


def _read_sweep(pick: str, config_dir: Path) -> list[dict[str, Any]]:
    path = Path(pick) if pick.endswith((".yaml", ".yml")) else config_dir / "sweep" / f"{pick}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in (config_dir / "sweep").glob("*.yaml"))
        close = difflib.get_close_matches(pick, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names)}"
        raise ValueError(f"sweep={pick}: no file {path}; {hint}")
    content = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"sweep={pick}: {path} must hold a list of mappings of keys to values")
    return [{str(key): _text(value) for key, value in entry.items()} for entry in content]


def _text(value: Any) -> Any:
    """As on a command line: true, not True."""
    if isinstance(value, list):
        return [_text(entry) for entry in value]
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_all(runs: list[SweepRun], workers: int, script: Path = TRAIN) -> dict[str, int]:
    """Runs `script` once per run, `workers` at a time; one line for each that ends.

    Returns:
        Exit codes by the name of the run, without those that SIGTERM or Ctrl-C left unstarted.
    """
    codes: dict[str, int] = {}
    waiting = deque(zip(runs, _free_ports(len(runs)), strict=True))
    running: dict[subprocess.Popen[bytes], tuple[SweepRun, float, str]] = {}
    gpus = visible_gpus()
    stopping = threading.Event()
    previous = {
        number: signal.signal(number, lambda *_: stopping.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        while running or (waiting and not stopping.is_set()):
            while waiting and len(running) < workers and not stopping.is_set():
                run, port = waiting.popleft()
                taken = [gpu for _, _, gpu in running.values()]
                gpu = min(gpus, key=taken.count, default="")
                running[_start(run, port, gpu, script)] = run, time.perf_counter(), gpu
            time.sleep(POLL_SECONDS)
            for process in list(running):
                code = process.poll()
                if code is None and stopping.is_set():
                    process.terminate()  # again and again: it may not have been listening yet
                if code is None:
                    continue
                run, began, _ = running.pop(process)
                codes[run.run_dir.name] = code
                took = f"{time.perf_counter() - began:.0f} s"
                print(f"[{len(codes)}/{len(runs)}] {took:>6}  {describe(run, code)}", flush=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return codes


def _free_ports(count: int) -> list[int]:
    """Different ones, because all are held at once."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _start(run: SweepRun, port: int, gpu: str, script: Path) -> subprocess.Popen[bytes]:
    run.run_dir.mkdir(parents=True, exist_ok=True)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    alone |= {"MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": gpu}
    with open(run.log, "wb") as log:
        return subprocess.Popen(
            [sys.executable, str(script), *run.arguments],
            env={"OMP_NUM_THREADS": "1", **os.environ, **alone},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which tells the others
        )


def describe(run: SweepRun, code: int) -> str:
    """How a run ended; for a failed one with the last line that it said."""
    if code == FINISHED:
        return f"{run.run_dir}  finished"
    if code in STOPPED_CODES:
        return f"{run.run_dir}  stopped"
    said = run.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{run.run_dir}  FAILED (exit code {code}): {said[-1] if said else ''}  ({run.log})"


def main(arguments: list[str], script: Path = TRAIN) -> int:
    """Runs the command; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return FINISHED
    own = dict(a.partition("=")[::2] for a in arguments if a.startswith(("workers=", "dry_run=")))
    workers, dry_run = own.get("workers", "1"), own.get("dry_run", "false")
    try:
        if not workers.isdecimal() or int(workers) < 1:
            raise ValueError(f"workers={workers}: must be a whole number of at least 1")
        if dry_run not in ("true", "false"):
            raise ValueError(f"dry_run={dry_run}: must be true or false")
        runs = expand([a for a in arguments if a.partition("=")[0] not in own])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if dry_run == "true":
        for run in runs:
            print(shlex.join(["python", "launch/train.py", *run.arguments]))
        return FINISHED
    print(f"{len(runs)} runs, {workers} at a time", flush=True)
    codes = run_all(runs, int(workers), script)
    finished = sum(code == FINISHED for code in codes.values())
    failed = [name for name, code in codes.items() if code not in (FINISHED, *STOPPED_CODES)]
    print(f"{finished} of {len(runs)} runs finished")
    if failed:
        print(f"error: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
        return FAILED
    return FINISHED if finished == len(runs) else STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
