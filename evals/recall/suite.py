"""`suite=recall` of launch/evaluate.py: what a trained run remembers, as a folder of results.

    OUT/cells/*.json   losses of every candidate, the only thing a model was needed for
    OUT/facts.json     identity of model, data and cells; questions; gates; cost
    OUT/result.json    the same and the metrics
    OUT/cells.csv      the metrics as a table
    OUT/recall.png     heat maps of depth and length, losses of the induction probe
    OUT/report.html    the same as a page to look at, without any file beside it
    OUT/tensorboard    the metrics over length as scalars

What is scored is kept. `result.json` of an interrupted and resumed run, of one process and of
several differ in `created`, `command` and `cost` only.
"""

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals import plots, results_folder, tensorboard
from evals.facts import FACTS, header, read_facts
from evals.recall import likelihood, probe_report
from evals.recall.branching import check_branching
from evals.recall.likelihood import Cell, RecallOptions
from evals.recall.probes import SPAN_TOKENS, Encode
from evals.scoring import gates
from evals.scoring.documents import EvalDocuments
from evals.scoring.processes import Processes
from evals.scoring.protocols import parse_contexts
from evals.scoring.score import ScoredModel, model_identity
from evals.scoring.store import write_bytes
from evals.subject import Subject, SubjectArguments

SCHEMA = "longspan.eval.recall/1"
OUTPUTS = (FACTS, "result.json", "cells.csv", "recall.png", "report.html")
"""What a failed evaluation must not leave standing from an earlier one."""


@dataclass
class RecallArguments(SubjectArguments):
    """What `suite=recall` understands; see `RecallOptions`, lengths in tokens."""

    lengths: str = ""  # FIRST..LAST doubles; default: a quarter to four times the training length
    depths: str = "0,0.25,0.5,0.75,1"
    probes: str = ",".join(likelihood.PROBES)
    trials: int = 100
    candidates: int = 10
    question_seed: int = 0
    segment_tokens: int = 2048


def plan(arguments: RecallArguments, subject: Subject) -> RecallOptions:
    """What the words ask for.

    Raises:
        ValueError: an option is wrong, or does not fit the model or its documents.
    """
    train_length, limit = subject.train_length, subject.model.max_tokens
    longest = 4 * train_length if limit is None else min(4 * train_length, limit - SPAN_TOKENS)
    lengths = arguments.lengths or f"{max(1, train_length // 4)}..{longest}"
    options = RecallOptions(
        lengths=parse_contexts(lengths, "lengths"),
        depths=parse_depths(arguments.depths),
        probes=tuple(filter(None, arguments.probes.split(","))),
        trials=arguments.trials,
        candidates=arguments.candidates,
        seed=arguments.question_seed,
        segment_tokens=arguments.segment_tokens,
    )
    likelihood.check(subject.model, subject.documents, subject.tokenizer.encode, options)
    return options


def evaluate(subject: Subject, options: RecallOptions, out_dir: Path, command: str) -> None:
    """Asks a model, writes its folder and prints the path of its page last."""
    result = run(
        subject.model,
        subject.documents,
        subject.tokenizer.encode,
        options,
        out_dir,
        **subject.said(command),
    )
    if subject.processes.is_main:
        show(result, out_dir)


def show(result: dict[str, Any], out_dir: Path) -> None:
    """Prints what was found and the page's path last."""
    print("\n".join(probe_report.findings(result)))
    print(out_dir / "report.html")


def run(
    model: ScoredModel,
    documents: EvalDocuments,
    encode: Encode,
    options: RecallOptions,
    out_dir: Path,
    *,
    name: str,
    train_length: int,
    provenance: dict[str, Any],
    processes: Processes | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the suite and writes its files.

    Args:
        model: the model, in evaluation mode.
        documents: held-out documents, the passages of contexts.
        encode: their tokenizer's.
        options: what to ask.
        out_dir: where the files go; finished cells found there are kept.
        name: the run's name in tables and plots.
        train_length: tokens of a training segment, marked in every plot.
        provenance: `command`, and further facts for `model` in result.json.
        processes: that share the work; None: this one alone.
        progress: show a bar.

    Returns:
        The content of result.json, in every process.

    Raises:
        ValueError: of `likelihood.check`, or `out_dir` holds an evaluation of more documents, or
            one that is still going on.
        GateFailure: a gate did not hold; earlier results in `out_dir` are gone by then.
        ProcessLost: another process died or hangs.
    """
    likelihood.check(model, documents, encode, options)
    with results_folder.claim(out_dir, documents, OUTPUTS, processes) as among:
        before = model.fingerprint()
        checked = gates.check_model(model, documents, gates.longest_input(model, train_length))
        checked += check_branching(model, documents, encode, options)
        gates.require(checked)
        scores = likelihood.score_cells(
            model,
            documents,
            encode,
            options,
            out_dir / "cells",
            model_id=model_identity(before, model.precision),
            processes=among,
            progress=progress,
        )
        unchanged = gates.check_unchanged(before, model.fingerprint())
        gates.require([unchanged])

        def write() -> dict[str, Any]:
            finite = likelihood.check_finite(scores)
            gates.require([finite])
            facts = {
                "schema": SCHEMA,
                "suite": "recall",
                "name": name,
                **header(model, documents, train_length, provenance),
                "questions": asdict(options),
                "cells": [{**c._asdict(), "identity": s.identity} for c, s in scores.items()],
                "gates": [gate.as_dict() for gate in (*checked, finite, unchanged)],
                "cost": [{"cell": c.name, "seconds": s.seconds} for c, s in scores.items()],
            }
            facts["model"]["weights_sha256"] = before
            write_bytes(out_dir / FACTS, (json.dumps(facts, indent=1) + "\n").encode())
            return derive(out_dir)

        result: dict[str, Any] = among.from_main("result", write)
    return result


def rebuild(out_dir: Path) -> None:
    """Derives everything in a folder anew from its cells, and prints the same."""
    show(derive(out_dir), out_dir)


def derive(out_dir: Path) -> dict[str, Any]:
    """Writes all files of an evaluation anew, from its cells and facts.json.

    Returns:
        The content of result.json: the facts as they are, and the metrics derived again.

    Raises:
        ValueError: nothing was evaluated there, or a cell is missing or another one.
    """
    facts = read_facts(out_dir, SCHEMA)
    wanted = {Cell(c["probe"], c["length"], c["depth"]): c["identity"] for c in facts["cells"]}
    scores = likelihood.load_all(out_dir / "cells", wanted)
    result = {
        **facts,
        "skipped": [
            {**cell._asdict(), "reason": found.skipped}
            for cell, found in scores.items()
            if found.skipped
        ],
        "metrics": likelihood.derive(scores),
    }
    over_length = [
        {**metric, "protocol": metric["probe"], "context": metric["length"]}
        for metric in result["metrics"]
        if metric["depth"] is None
    ]
    tensorboard.write(over_length, out_dir, result["model"].get("trained_steps", 0))
    write_bytes(out_dir / "cells.csv", _csv(result["metrics"]).encode())
    write_bytes(out_dir / "recall.png", plots.to_png(probe_report.figure(result)))
    write_bytes(out_dir / "report.html", probe_report.page(result).encode())
    write_bytes(out_dir / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return result


def parse_depths(text: str) -> tuple[float, ...]:
    """The shares of `depths=0,0.5,1`.

    Raises:
        ValueError: one of them is no number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"depths={text} is no list of shares; use numbers from 0 to 1, such as 0,0.5,1"
        ) from None


def _csv(metrics: list[dict[str, Any]]) -> str:
    columns = "probe name length depth value chance se ci95_low ci95_high ci95_by_trial_low"
    columns += " ci95_by_trial_high n_docs n_trials n_docs_low"
    text = io.StringIO()
    writer = csv.DictWriter(text, columns.split(), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for metric in metrics:
        row = dict(metric)
        for key in ("ci95", "ci95_by_trial"):
            row.update(zip((f"{key}_low", f"{key}_high"), metric.get(key) or (), strict=False))
        writer.writerow(row)
    return text.getvalue()
