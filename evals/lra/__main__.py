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

import sys
from dataclasses import dataclass
from pathlib import Path

from evals.lra import report
from evals.lra.jobs import Experiment
from evals.lra.prepare import prepare
from evals.lra.rows import ROWS
from evals.lra.tasks import TASKS
from evals.lra.train import TrainOptions
from evals.trainings import run_all, write_table
from pretrain.command_line import check_positive, choose, first_device, parse, parse_rates

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
    command = ["python", "-m", "evals.lra", *argv]
    write_table(out_dir, table, records, command, device=experiment.device, data=experiment.sha256)
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
    rows = choose("mixers", arguments.mixers, ROWS)
    steps = task.steps if arguments.steps is None else arguments.steps
    batch_size = task.batch_size if arguments.batch_size is None else arguments.batch_size
    check_positive(
        seeds=arguments.seeds, steps=steps, batch_size=batch_size, workers=arguments.workers
    )
    if arguments.compile not in ("auto", "true", "false"):
        raise ValueError(f"compile={arguments.compile} is not known; use auto, true or false")
    rates = parse_rates(arguments.learning_rates)
    device = first_device(arguments.device).type
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
