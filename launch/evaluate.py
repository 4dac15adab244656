"""Evaluates a trained model, compares training curves, or measures what context costs.

    python launch/evaluate.py run=runs/NAME suite=perplexity contexts=64..8192
    torchrun --nproc_per_node=4 launch/evaluate.py run=runs/NAME suite=all
    python launch/evaluate.py run=runs/NAME suite=extrapolation multiples=1/8..256
    python launch/evaluate.py run=runs/NAME suite=recall lengths=256..4096 depths=0,0.5,1
    python launch/evaluate.py rebuild run=runs/NAME suite=perplexity
    python launch/evaluate.py curves runs/rows/* out=runs/rows_curves baseline=swa_tiny
    python launch/evaluate.py costs runs/denoising_base/* out=runs/denoising_base_costs
    python launch/evaluate.py streaming models=swa_tiny,bst_tiny out=runs/streaming

The first writes runs/NAME/eval/SUITE/ (for perplexity result.json, curve.csv, curve.png,
report.html, tokens/*.npz); a second call rescores nothing that is there, after an interruption
either, and several processes, under torchrun or deepspeed, share the documents. launch/compare.py
compares what several runs left. `rebuild` derives all files anew from those of the first, without
the model. `curves` compares the training curves of a sweep (launch/sweep.py):
curves.png, rows.csv, rows.md; `costs` puts what each training cost beside its losses: costs.md,
costs.csv. `streaming` needs no run: it measures the models of configs/model/ on
the CPU (OMP_NUM_THREADS=1: on one core; evals/streaming.py names two more settings for the C
library's memory) and writes streaming.md, .json, .csv and .png. Exit codes: 0 done, 1 a model that
claims a constant state grows with the context, 2 bad input, 3 a gate failed and no report was
written, 4 another process of the launch failed.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evals import curves, streaming, training_costs
from evals.extrapolation import command as extrapolation_suite
from evals.extrapolation.command import ExtrapolationArguments
from evals.perplexity import command as perplexity_suite
from evals.perplexity.command import PerplexityArguments
from evals.recall import suite as recall_suite
from evals.recall.suite import RecallArguments
from evals.results_folder import check_replaces_no_larger
from evals.scoring.gates import GateFailure
from evals.scoring.processes import ProcessLost
from evals.scoring.protocols import parse_contexts
from evals.subject import Subject, SubjectArguments, open_subject
from pretrain.command_line import parse
from pretrain.config import load_config
from pretrain.models import LanguageModel
from pretrain.training.manifest import CheckpointError

GROWS, BAD_INPUT, GATE_FAILED, PROCESS_LOST = 1, 2, 3, 4


@dataclass
class RebuildArguments:
    """Everything `evaluate.py rebuild` understands."""

    run: str = ""
    suite: str = "perplexity"
    name: str = ""  # of the result folder; default: the suite


@dataclass
class CurvesArguments:
    """Everything `evaluate.py curves RUN ...` understands."""

    out: str = ""
    baseline: str = ""  # the row that all are compared with
    last_steps: int = 50  # optimizer steps behind the final training loss


@dataclass
class CostsArguments:
    """Everything `evaluate.py costs RUN ...` understands."""

    out: str = ""


@dataclass
class StreamingArguments:
    """Everything `evaluate.py streaming` understands; see `StreamingOptions`, lengths in tokens."""

    out: str = ""
    models: str = ""  # of configs/model/, or .yaml files; default: every *_tiny decoder
    contexts: str = "2048..262144"
    lengths: str = "2048..32768"
    growing_tokens: int = 8192
    segment_tokens: int = 2048
    rounds: int = 15
    training_rounds: int = 3


class Suite(NamedTuple):
    """A suite of `run=`.

    Attributes:
        arguments: the words that it understands.
        plan: the options that they stand for, all checked before any work is done.
        evaluate: scores a subject by these options into a folder, and takes the command down;
            called in every process of a launch.
        rebuild: derives the results in a folder anew, from what the model was needed for.
    """

    arguments: type[SubjectArguments]
    plan: Callable[[Any, Subject], Any]
    evaluate: Callable[[Subject, Any, Path, str], None]
    rebuild: Callable[[Path], None]


SUITES: dict[str, Suite] = {
    "perplexity": Suite(
        PerplexityArguments,
        perplexity_suite.plan,
        perplexity_suite.evaluate,
        perplexity_suite.rebuild,
    ),
    "extrapolation": Suite(
        ExtrapolationArguments,
        extrapolation_suite.plan,
        extrapolation_suite.evaluate,
        extrapolation_suite.rebuild,
    ),
    "recall": Suite(
        RecallArguments, recall_suite.plan, recall_suite.evaluate, recall_suite.rebuild
    ),
}


def main(argv: list[str]) -> int:
    """Runs a command line; the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    command = shlex.join(["launch/evaluate.py", *argv])
    # Appended by the deepspeed launcher; the environment has it, too.
    argv = [word for word in argv if not word.startswith("--local_rank")]
    try:
        if argv[0] == "curves":
            positional = [word for word in argv[1:] if "=" not in word]
            options = [word for word in argv[1:] if "=" in word]
            return compare_curves(positional, parse(CurvesArguments, options))
        if argv[0] == "costs":
            positional = [word for word in argv[1:] if "=" not in word]
            options = [word for word in argv[1:] if "=" in word]
            return compare_costs(positional, parse(CostsArguments, options))
        if argv[0] == "rebuild":
            return rebuild(parse(RebuildArguments, argv[1:]))
        if argv[0] == "streaming":
            return measure_streaming(parse(StreamingArguments, argv[1:]), command)
        return evaluate(argv, command)
    except (ValueError, CheckpointError) as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one of each node speaks
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except (OSError, GateFailure, ProcessLost) as error:  # may be this process's own
        rank = os.environ.get("RANK", "0")
        print(f"error: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
        codes = {GateFailure: GATE_FAILED, ProcessLost: PROCESS_LOST}
        return codes.get(type(error), BAD_INPUT)


def evaluate(words: list[str], command: str) -> int:
    """Runs the suite that the words name, or all of them one after the other."""
    chosen = dict(word.split("=", 1) for word in words if "=" in word).get("suite", "perplexity")
    if chosen == "lra":
        raise ValueError(
            "suite=lra trains encoders from scratch and evaluates no run; use "
            "python -m evals.lra task=listops out=runs/lra/listops"
        )
    if chosen != "all":
        check_suite(chosen, (*SUITES, "all"))
    elif any(word.startswith("name=") for word in words):
        raise ValueError("name= names one suite's folder; leave it out of suite=all")
    elif any(word.startswith("hf=") for word in words):
        raise ValueError(
            "suite=all has suite=extrapolation, and a folder of hf= is not read beyond its "
            "max_position_embeddings; use suite=perplexity, then suite=recall"
        )
    suites = SUITES if chosen == "all" else {chosen: SUITES[chosen]}
    arguments = parse_for(suites, words)
    subject = open_subject(arguments[0])  # by words that every suite understands
    planned = []
    for (name, suite), own in zip(suites.items(), arguments, strict=True):
        out_dir = subject.results / (own.name or name)
        check_replaces_no_larger(out_dir, subject.documents)
        planned.append((suite, suite.plan(own, subject), out_dir))
    # Only now, so that a bad word for the last suite costs nothing of the first.
    for suite, options, out_dir in planned:
        suite.evaluate(subject, options, out_dir, command)
    return 0


def check_suite(name: str, known: Iterable[str]) -> None:
    """Raises:
    ValueError: there is no such suite.
    """
    if name not in known:
        raise ValueError(f"suite={name} is not known; use one of {', '.join(known)}")


def parse_for(suites: dict[str, Suite], words: list[str]) -> list[Any]:
    """Each suite's arguments: of several suites, each gets the words that it understands.

    Raises:
        ValueError: no suite understands a word, or its value has the wrong type.
    """
    known = {name: {f.name for f in fields(suite.arguments)} for name, suite in suites.items()}
    everything = set().union(*known.values())
    stray = [word for word in words if word.partition("=")[0] not in everything]
    return [
        parse(suite.arguments, [w for w in words if w.partition("=")[0] in known[name]] + stray)
        for name, suite in suites.items()
    ]


def rebuild(arguments: RebuildArguments) -> int:
    """Derives a suite's results anew from what is stored; loads no model."""
    check_suite(arguments.suite, SUITES)
    if not arguments.run:
        raise ValueError("run= is missing; use rebuild run=runs/NAME")
    folder = Path(arguments.run) / "eval" / (arguments.name or arguments.suite)
    SUITES[arguments.suite].rebuild(folder)
    return 0


def compare_curves(paths: list[str], arguments: CurvesArguments) -> int:
    """Compares how runs trained."""
    if not paths or not arguments.out or not arguments.baseline:
        raise ValueError(
            "curves needs runs, out= and baseline=; use curves runs/rows/* out=runs/rows_curves "
            "baseline=swa_tiny"
        )
    out_dir = Path(arguments.out)
    print(
        curves.write(
            [Path(path) for path in paths],
            out_dir,
            baseline=arguments.baseline,
            last_steps=arguments.last_steps,
        )
    )
    print(out_dir / "curves.png")
    return 0


def compare_costs(paths: list[str], arguments: CostsArguments) -> int:
    """Compares what runs cost."""
    if not paths or not arguments.out:
        raise ValueError("costs needs runs and out=; use costs runs/A runs/B out=runs/costs")
    print(training_costs.write([Path(path) for path in paths], Path(arguments.out)))
    return 0


def measure_streaming(arguments: StreamingArguments, command: str) -> int:
    """Measures untrained models one after the other; what is done so far is in the files."""
    if not arguments.out:
        raise ValueError("out= is missing; use streaming models=swa_tiny,bst_tiny out=DIR")
    names = arguments.models.split(",") if arguments.models else streaming.tiny_models()
    options = streaming.StreamingOptions(
        contexts=parse_contexts(arguments.contexts),
        lengths=parse_contexts(arguments.lengths),
        growing_tokens=arguments.growing_tokens,
        segment_tokens=arguments.segment_tokens,
        rounds=arguments.rounds,
        training_rounds=arguments.training_rounds,
    )
    if options.problems():
        raise ValueError("; ".join(options.problems()))
    configs = [load_config([f"model={name}"]).model for name in names]
    if readers := [name for name, c in zip(names, configs, strict=True) if c.has_encoder]:
        raise ValueError(
            f"models={','.join(readers)}: an encoder reads all of its input at once; leave it out"
        )
    measurements = []
    for name, config in zip(names, configs, strict=True):
        model = LanguageModel(replace(config, vocab_size=streaming.VOCABULARY))
        measurements.append(streaming.measure(Path(name).stem, model, options))
        print(f"{measurements[-1].name}: {measurements[-1].verdict()}", flush=True)
        streaming.write(measurements, options, Path(arguments.out), command)
    print(streaming.table(measurements), end="")
    return 0 if all(m.passed for m in measurements) else GROWS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
