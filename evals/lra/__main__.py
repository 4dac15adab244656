"""Trains encoders on a task of the Long Range Arena and prints the table.

    python -m evals.lra task=listops mixers=s4d,swa seeds=3 out=runs/lra/listops workers=6
    python -m evals.lra task=text source=aclImdb out=runs/lra/text

Keys: task=listops|pathfinder|pathx, generated, or text|retrieval|image, read from source=, a folder
of the published files (evals/lra/files.py names them); mixers= names of evals/lra/rows.py, default
all; seeds= how many; learning_rates=, each of which every model and seed is trained with; steps=,
batch_size= of a training; data= folder of the examples, default out/data; workers= processes, of
one thread each; device=auto|cpu|cuda; compile=auto|true|false, auto: the blocks are compiled on a
GPU; out=. A second call trains only what `out` does not hold, and goes on where a training was
interrupted. Writes out/table.md and results.json; exit code 2 for bad input.
"""

import difflib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from evals.lra import report
from evals.lra.jobs import Experiment
from evals.lra.prepare import prepare
from evals.lra.rows import ROWS
from evals.lra.tasks import TASKS
from evals.lra.train import TrainOptions
from evals.trainings import run_all
from pretrain.command_line import choose_device, parse, parse_rates
from pretrain.training.environment import git_commit

BAD_INPUT = 2
DATA_SEED = 0


@dataclass
class LRAArguments:
    """Everything that the command understands."""

    task: str = "listops"
    mixers: str = ",".join(ROWS)
    seeds: int = 3
    learning_rates: str = "1e-3,3e-3"
    steps: int | None = None  # default: the task's
    batch_size: int | None = None  # default: the task's
    source: str = ""
    data: str = ""
    workers: int = 1
    device: str = "auto"
    compile: str = "auto"
    out: str = ""


def main(argv: list[str]) -> int:
    """Runs a command line; the exit code."""
    if argv and argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    try:
        arguments = parse(LRAArguments, argv)
        experiment = plan(arguments)
        out_dir = Path(arguments.out)
        results = run_all(experiment, out_dir / "trainings", arguments.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    records = report.summarise(results)
    table = report.markdown(records)
    provenance = {
        "command": shlex.join(["python", "-m", "evals.lra", *argv]),
        "commit": git_commit(),
        "torch": torch.__version__,
        "device": experiment.device,
        "data": experiment.sha256,
    }
    (out_dir / "table.md").write_text(table + "\n", encoding="utf-8")
    content = json.dumps({"provenance": provenance, "models": records}, indent=1)
    (out_dir / "results.json").write_text(content + "\n", encoding="utf-8")
    print(table)
    return 0


def plan(arguments: LRAArguments) -> Experiment:
    """The experiment, its examples generated or imported.

    Raises:
        ValueError: with the key, its value and what to write instead.
    """
    if not arguments.out:
        raise ValueError("out= is missing; use out=runs/lra/listops")
    if arguments.task not in TASKS:
        raise ValueError(f"task={arguments.task} is not known; use one of {', '.join(TASKS)}")
    task = TASKS[arguments.task]
    rows = tuple(arguments.mixers.split(","))
    for row in rows:
        if row not in ROWS:
            close = difflib.get_close_matches(row, ROWS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use some of {', '.join(ROWS)}"
            raise ValueError(f"mixers={arguments.mixers}: {row!r} is no row of the table; {hint}")
    steps = task.steps if arguments.steps is None else arguments.steps
    batch_size = task.batch_size if arguments.batch_size is None else arguments.batch_size
    counts = {
        "seeds": arguments.seeds,
        "steps": steps,
        "batch_size": batch_size,
        "workers": arguments.workers,
    }
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
    if arguments.compile not in ("auto", "true", "false"):
        raise ValueError(f"compile={arguments.compile} is not known; use auto, true or false")
    rates = parse_rates(arguments.learning_rates)
    device = choose_device(arguments.device).type
    compiled = device == "cuda" if arguments.compile == "auto" else arguments.compile == "true"
    data = Path(arguments.data or Path(arguments.out) / "data")
    hashes = prepare(
        task.examples,
        data,
        sizes=task.sizes,
        seed=DATA_SEED,
        source=Path(arguments.source) if arguments.source else None,
        workers=arguments.workers,
    )
    return Experiment(
        task=arguments.task,
        data=data,
        sha256=hashes,
        rows=rows,
        seeds=tuple(range(arguments.seeds)),
        learning_rates=rates,
        options=TrainOptions(
            steps=steps,
            batch_size=batch_size,
            autocast=device == "cuda",
            compiler="inductor" if compiled else "",
        ),
        device=device,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
