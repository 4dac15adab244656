"""The perplexity suite: score passes, check the gates, derive every metric from the token store.

    OUT/tokens/PASS.npz   per-token losses, the only thing a model was needed for
    OUT/facts.json        identity of model, data and protocols; gates; cost
    OUT/result.json       the same and the metrics
    OUT/curve.csv         the metrics as a table
    OUT/curve.png         bits per byte and gain over context
    OUT/tensorboard       the metrics as scalars

What is scored is kept: a second run with the same weights, data and protocol rescores nothing. On
one machine with one number of threads, `result.json` of an interrupted and resumed run, of one
process or several, differs in `created`, `command` and `cost` only (evals/scoring/passes.py says
why).

The metrics are those of evals/perplexity/metrics.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import plots, results_folder, tensorboard
from evals.facts import FACTS, costs, header, load_facts, protocol_record
from evals.perplexity.metrics import curve_csv, derive
from evals.scoring import gates, protocols
from evals.scoring.documents import EvalDocuments
from evals.scoring.passes import score_passes
from evals.scoring.processes import Processes
from evals.scoring.protocols import Pass
from evals.scoring.score import ScoredModel, model_identity
from evals.scoring.store import TokenTable, write_bytes

SCHEMA = "longspan.eval.perplexity/2"
DEFAULT_PROTOCOLS = ("fixed", "position", "stream", "nonoverlap")
PROTOCOLS = (*DEFAULT_PROTOCOLS, "sliding", "truncate")
OUTPUTS = (FACTS, "result.json", "curve.csv", "curve.png", "report.html", "report.md", "report.png")
"""What a failed evaluation must not leave standing from an earlier one."""


@dataclass(frozen=True)
class PerplexityOptions:
    """What to score. Lengths in tokens.

    Attributes:
        contexts: of `fixed`, and the window lengths of `sliding` and `truncate`; the largest is
            also the length of `position`.
        protocols: any of `PROTOCOLS`.
        span_tokens: T of `fixed`; None: 64, at most a quarter of the smallest context.
        spans_per_document: target spans of `fixed`; more narrow the intervals within documents.
        stream_tokens: first tokens of each document for `stream`, `nonoverlap` and `sliding`; None:
            all.
        segment_tokens: of `stream`: how much runs at once before the state is handed on.
        window_tokens: L of `nonoverlap`; None: the training length.
        stride_tokens: S of `sliding`; None: 256, at most half of the smallest context.
    """

    contexts: tuple[int, ...]
    protocols: tuple[str, ...] = DEFAULT_PROTOCOLS
    span_tokens: int | None = None
    spans_per_document: int = 4
    stream_tokens: int | None = None
    segment_tokens: int = 2048
    window_tokens: int | None = None
    stride_tokens: int | None = None

    def problems(self) -> list[str]:
        """One line per bad value; empty when all is well."""
        found = []
        if not self.contexts or min(self.contexts) < 1:
            found.append(f"contexts={list(self.contexts)}: at least one, each >= 1")
        unknown = sorted(set(self.protocols) - set(PROTOCOLS))
        if unknown or not self.protocols:
            found.append(
                f"protocols={','.join(self.protocols)}: choose from {', '.join(PROTOCOLS)}"
            )
        for name in (
            "span_tokens",
            "spans_per_document",
            "stream_tokens",
            "segment_tokens",
            "window_tokens",
            "stride_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name}={value}: must be at least 1")
        return found


def plan(
    model: ScoredModel, documents: EvalDocuments, options: PerplexityOptions, train_length: int
) -> list[Pass]:
    """All passes of the suite, in the order of `options.protocols`.

    Raises:
        ValueError: an option is wrong, no document is long enough, or the model cannot see so much.
    """
    if problems := options.problems():
        raise ValueError("; ".join(problems))
    lengths = documents.lengths
    window = options.window_tokens or train_length
    passes: list[Pass] = []
    for name in options.protocols:
        if name == "fixed":
            passes += protocols.fixed(
                lengths,
                options.contexts,
                options.span_tokens,
                options.spans_per_document,
            )
        elif name == "position":
            passes += protocols.position(lengths, max(options.contexts))
        elif name == "stream":
            passes += protocols.stream(lengths, options.segment_tokens, options.stream_tokens)
        elif name == "nonoverlap":
            passes += protocols.nonoverlap(lengths, window, options.stream_tokens)
        elif name == "sliding":
            passes += protocols.sliding(
                lengths, options.contexts, options.stride_tokens, options.stream_tokens
            )
        else:
            passes += protocols.truncate(lengths, options.contexts)
    protocols.check_room(passes, model.max_tokens)
    return passes


def run(
    model: ScoredModel,
    documents: EvalDocuments,
    options: PerplexityOptions,
    out_dir: Path,
    *,
    name: str,
    train_length: int,
    provenance: dict[str, Any] | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the suite and writes its files.

    Args:
        model: the model, in evaluation mode.
        documents: held-out documents.
        options: what to score.
        out_dir: where the files go; finished passes found there are kept.
        name: the run's name in tables and plots.
        train_length: tokens of a training segment, marked in every plot.
        provenance: further facts for `model` in result.json, and `command`.
        processes: that share the work; None: this one alone.
        progress: show a bar.

    Returns:
        The content of result.json, in every process.

    Raises:
        ValueError: of `plan`, or `out_dir` holds an evaluation of more documents, or one that is
            still going on.
        GateFailure: a gate did not hold; earlier results in `out_dir` are gone by then.
        ProcessLost: another process died or hangs.
    """
    passes = plan(model, documents, options, train_length)
    before = model.fingerprint()
    checked: list[gates.GateResult] = []
    tables: dict[str, TokenTable] = {}

    def write() -> dict[str, Any]:
        checked.extend(gates.check_coverage(scoring, tables[scoring.name]) for scoring in passes)
        gates.require(checked)
        facts = {
            "schema": SCHEMA,
            "suite": "perplexity",
            "name": name,
            **header(model, documents, train_length, provenance or {}),
            "protocols": [protocol_record(scoring, tables[scoring.name]) for scoring in passes],
            "gates": [gate.as_dict() for gate in checked],
            "cost": costs(tables),
        }
        facts["model"]["weights_sha256"] = before
        write_bytes(out_dir / FACTS, (json.dumps(facts, indent=1) + "\n").encode())
        return rebuild(out_dir)

    with results_folder.claim(out_dir, documents, OUTPUTS, processes) as among:
        checked += gates.check_model(model, documents, gates.longest_input(model, train_length))
        gates.require(checked)
        tables |= score_passes(
            model,
            documents,
            passes,
            out_dir / "tokens",
            model_id=model_identity(before, model.precision),
            processes=among,
            progress=progress,
        )
        checked.append(gates.check_unchanged(before, model.fingerprint()))
        gates.require(checked)
        result: dict[str, Any] = among.from_main("result", write)
    return result


def rebuild(out_dir: Path) -> dict[str, Any]:
    """Writes all files of an evaluation but its page anew, from its token store and facts.json.

    Returns:
        The content of result.json: the facts as they are, and the metrics derived again.

    Raises:
        ValueError: nothing was evaluated there, a pass is missing, or it is not the one that the
            facts are about.
    """
    facts, tables = load_facts(out_dir, SCHEMA)
    result = {**facts, "metrics": derive(tables, facts["model"]["train_length"])}
    trained_steps = result["model"].get("trained_steps", 0)
    tensorboard.write(result["metrics"], out_dir, trained_steps)
    write_bytes(out_dir / "curve.csv", curve_csv(result["metrics"]).encode())
    write_bytes(out_dir / "curve.png", plots.to_png(plots.curve_figure([result])))
    write_bytes(out_dir / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return result
