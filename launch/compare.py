"""Compares evaluated runs: who is better at each context, and is it more than chance?

    python launch/compare.py runs/A runs/B runs/C out=runs/compared
    python launch/compare.py runs/some/* baseline=swa_tiny ngram=true

Each run was evaluated before (launch/evaluate.py run=... suite=perplexity), on the same documents
with the same protocols; anything else is refused by name. Prints a table of bits per byte with a
verdict per context, then what was found in words; `out=` also writes report.html, report.md and
report.png there and prints the page's path last.

Runs that differ in the seed alone are one row, their mean, with the spread between seeds beside it.
Evaluations of one name, such as two checkpoints of a run, are called by their paths. All pairs are
compared, each verdict read from a band that holds all contexts and all pairs at once;
`baseline=NAME` compares the others with that one only, which narrows the bands. `ngram=true` adds a
byte 5-gram trained on the first run's text. `name=` is that of the evaluations, the folder below
RUN/eval. `allow=policy` or `allow=precision` lets that difference pass and says so in the report.

Exit codes: 0 done, 2 bad input or runs that do not compare.
"""

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.shards import Corpus
from evals import page, report, seeds
from evals.compare import EvalRun, check_allowances, compare, load
from evals.perplexity import baseline
from evals.scoring.documents import from_corpus
from pretrain.command_line import parse

DONE, BAD_INPUT = 0, 2


@dataclass
class CompareArguments:
    """Everything `compare.py RUN ...` understands."""

    out: str = ""
    name: str = "perplexity"  # of the evaluations, as launch/evaluate.py was given it
    baseline: str = ""  # a run's or row's name, or its path
    ngram: bool = False
    allow: str = ""  # of evals.compare.ALLOWANCES, with commas


def main(argv: list[str]) -> int:
    """Runs a command line; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return DONE
    try:
        paths = [Path(word) for word in argv if "=" not in word]
        words = [word for word in argv if "=" in word]
        if suite := next((word for word in words if word.startswith("suite=")), None):
            raise ValueError(
                f"{suite}: only suite=perplexity compares; the folder below RUN/eval is called by "
                "name=, as in evaluate.py"
            )
        options = parse(CompareArguments, words)
        compare_runs(paths, options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return DONE


def compare_runs(paths: list[Path], options: CompareArguments) -> None:
    """Prints what was found, and writes the page where `out` names a folder."""
    if not paths:
        raise ValueError("no runs; use compare.py runs/A runs/B out=runs/compared")
    allow = [word for word in options.allow.split(",") if word]
    check_allowances(allow)
    runs = seeds.group(named_apart([load(path, options.name) for path in paths], paths), allow)
    if options.baseline:
        runs = with_first(runs, options.baseline)
    out_dir = Path(options.out) if options.out else None
    if options.ngram:
        runs.append(evaluate_ngram(runs[0], out_dir))
    comparisons = compare(runs, with_first_only=bool(options.baseline), allow=allow)
    _, header, rows = report.level_table(runs, comparisons, brief=True)
    print(page.to_text(header, rows), end="\n\n")
    print("\n".join(report.findings(runs, comparisons, allow)))
    if out_dir:
        print(report.write(runs, out_dir, comparisons, allow))


def named_apart(runs: list[EvalRun], paths: list[Path]) -> list[EvalRun]:
    """The runs, those that share a name (two checkpoints of one training) by their paths."""
    times = Counter(run.name for run in runs)
    return [
        replace(run, name=str(path), result={**run.result, "name": str(path)})
        if times[run.name] > 1
        else run
        for run, path in zip(runs, paths, strict=True)
    ]


def with_first(runs: list[EvalRun], name: str) -> list[EvalRun]:
    """The runs, the one called so (by its row, its training or its path) in front.

    Raises:
        ValueError: there is none.
    """
    wanted = {name, str(Path(name)), Path(name).name}
    for run in runs:
        if wanted & {run.name, *(training.name for training in run.trainings)}:
            return [run, *(other for other in runs if other is not run)]
    names = ", ".join(run.name for run in runs)
    raise ValueError(f"baseline={name}: no such run; there are: {names}")


def evaluate_ngram(run: EvalRun, out_dir: Path | None) -> EvalRun:
    """The n-gram on a run's targets, from the corpus that the run was evaluated on."""
    data, model = run.result["data"], run.result["model"]
    if "training_path" not in model:
        raise ValueError(
            f"ngram=true: {run.name} does not say what it was trained on; leave it out"
        )
    return baseline.evaluate(
        from_corpus(Corpus.open(data["path"], data["split"]), data["limit"]),
        from_corpus(Corpus.open(model["training_path"], model["training_split"])),
        run,
        out_dir / "ngram" if out_dir else None,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
