"""Trains small models on a recall task and prints the table.

    python -m evals.recall task=flag out=runs/recall/flag workers=14 device=cuda
    python -m evals.recall task=mqar out=runs/recall/mqar mixers=mamba2,s4d,swa seeds=1
    python -m evals.recall task=induction out=runs/recall/induction test_lengths=2,4,8,16,32

Keys: task=flag|mqar|induction|selective_copy|phonebook; mixers= names of evals/recall/rows.py,
default all; seeds= how many; learning_rates= in the order in which they are tried; steps=,
batch_size= of a training; test_lengths= of the tests beyond the trained length, in trained lengths;
workers= processes, of one thread each; device=auto|cpu|cuda; out=. A second call trains only what
`out` does not hold. Writes out/table.md, table.csv, results.json, accuracy.png, which has accuracy
over state size and over length; exit code 2 for bad input.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from evals.plots import to_png
from evals.recall import report
from evals.recall.jobs import Experiment
from evals.recall.rows import N_LAYERS, ROWS, WINDOW
from evals.recall.tasks import (
    FlagRecall,
    InductionHeads,
    MultiQueryRecall,
    PhoneBook,
    RecallTask,
    SelectiveCopy,
)
from evals.recall.train import TrainOptions
from evals.trainings import run_all, write_table
from pretrain.command_line import check_positive, choose, first_device, numbers, parse, parse_rates

BAD_INPUT = 2


@dataclass(frozen=True)
class Preset:
    """A task, how long and with how many examples a step it is trained, and whether a row has a
    bar to reach on it."""

    task: RecallTask
    steps: int
    batch_size: int
    bars: bool = False


# 120 is no multiple of a window, and short enough for kernels that need no compilation. MQAR is one
# of Zoology's settings but for the vocabulary, theirs 8,192, which would be most of such a model.
# The published sizes of induction and selective copying are their classes' defaults; these here,
# and all of the phone book's, are ours: trained for minutes instead of 400,000 steps. Where an
# example asks one question, a batch has more of them.
PRESETS = {
    "flag": Preset(FlagRecall(seq_len=120, min_distance=2 * N_LAYERS * WINDOW), 1500, 64, True),
    "mqar": Preset(MultiQueryRecall(seq_len=64, n_pairs=8, vocab_size=512), 3000, 64),
    "induction": Preset(InductionHeads(seq_len=64), 2000, 128),
    "selective_copy": Preset(SelectiveCopy(seq_len=104, n_data=8), 3000, 64),
    "phonebook": Preset(
        PhoneBook(n_entries=16, name_length=1, number_length=3, n_letters=256), 3000, 256
    ),
}


@dataclass
class RecallArguments:
    """Everything that the command understands."""

    task: str = "flag"
    mixers: str = ",".join(ROWS)
    seeds: int = 3
    learning_rates: str = "3e-3,1e-2,1e-3"
    steps: int | None = None  # default: the task's
    batch_size: int | None = None  # default: the task's
    test_lengths: str = "2,4,8"
    workers: int = 1
    device: str = "auto"
    out: str = ""


def main(argv: list[str]) -> int:
    """Runs a command line; the exit code."""
    if argv and argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    try:
        arguments = parse(RecallArguments, argv)
        experiment, bars = plan(arguments)
        out_dir = Path(arguments.out)
        results = run_all(experiment, out_dir / "trainings", arguments.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    records = report.summarise(results, experiment.task.chance, bars=bars)
    table = report.markdown(records)
    title = f"{arguments.task} recall, {experiment.task.seq_len} tokens"
    write_table(
        out_dir,
        table,
        records,
        ["python", "-m", "evals.recall", *argv],
        device=experiment.device,
        chance=experiment.task.chance,
        experiment=asdict(experiment),
    )
    (out_dir / "table.csv").write_text(report.to_csv(records), encoding="utf-8")
    drawn = report.figure(records, experiment.task.chance, title)
    (out_dir / "accuracy.png").write_bytes(to_png(drawn))
    print(table)
    if bars:
        print(report.bars_line(records))
    return 0


def plan(arguments: RecallArguments) -> tuple[Experiment, bool]:
    """The experiment, and whether its rows have bars to reach.

    Raises:
        ValueError: with the key, its value and what to write instead.
    """
    if not arguments.out:
        raise ValueError("out= is missing; use out=runs/recall/flag")
    if arguments.task not in PRESETS:
        raise ValueError(f"task={arguments.task} is not known; use {', '.join(PRESETS)}")
    rows = choose("mixers", arguments.mixers, ROWS)
    preset = PRESETS[arguments.task]
    steps = preset.steps if arguments.steps is None else arguments.steps
    batch_size = preset.batch_size if arguments.batch_size is None else arguments.batch_size
    check_positive(
        seeds=arguments.seeds, steps=steps, batch_size=batch_size, workers=arguments.workers
    )
    lengths = numbers("test_lengths", arguments.test_lengths)
    if min(lengths) < 2 or len(set(lengths)) < len(lengths):
        raise ValueError(
            f"test_lengths={arguments.test_lengths}: different multiples of the trained length, "
            f"from 2 on; it is tested itself anyway"
        )
    for length in lengths:
        preset.task.stretched(length)  # refuses now what would not fit after the training
    experiment = Experiment(
        task=preset.task,
        rows=rows,
        seeds=tuple(range(arguments.seeds)),
        learning_rates=parse_rates(arguments.learning_rates),
        options=TrainOptions(
            steps=steps, batch_size=batch_size, test_lengths=tuple(sorted(lengths))
        ),
        device=first_device(arguments.device).type,
    )
    return experiment, preset.bars


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
