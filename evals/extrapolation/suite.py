"""The extrapolation suite: what contexts beyond the training length L0 are worth and cost.

    OUT/tokens/PASS.npz      per-token losses; everything else is derived from them
    OUT/facts.json           identity of model, data and protocols; gates; cost
    OUT/result.json          the same, and metrics, verdicts, effective context, concat
    OUT/extrapolation.csv    the metrics as a table, a verdict beside each gain beyond L0
    OUT/extrapolation.png    the figure; OUT/report.html the page; OUT/tensorboard the scalars

Contexts are multiples of L0, by default L0/8 .. 256 L0. Protocols, see `evals.scoring.protocols`:
`fixed` for the gains, over one set of target spans, so over those documents only that reach the
largest context; `stream` for the loss by position; `concat` for what no document is long enough
for, see `evals.extrapolation.concat`. A context that fewer than `min_documents` documents reach is
left out, its verdict `n_docs_low`: it would take the others down to those few documents.

What is said of them stands in `evals.extrapolation.metrics`.
"""

import json
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from evals import plots, results_folder, stats, tensorboard
from evals.extrapolation import concat
from evals.extrapolation.metrics import concat_metrics, derive, to_csv
from evals.facts import FACTS, costs, header, load_facts, protocol_record
from evals.scoring import gates, protocols
from evals.scoring.documents import EvalDocuments
from evals.scoring.passes import score_passes
from evals.scoring.processes import Processes
from evals.scoring.protocols import Pass
from evals.scoring.score import ScoredModel, model_identity
from evals.scoring.store import TokenTable, write_bytes

SCHEMA = "longspan.eval.extrapolation/1"
OUTPUTS = (FACTS, "result.json", "extrapolation.csv", "extrapolation.png", "report.html")
"""What a failed evaluation must not leave standing from an earlier one."""


@dataclass(frozen=True)
class ExtrapolationOptions:
    """What to score. Lengths in tokens.

    Attributes:
        contexts: of `fixed`; the training length is added.
        span_tokens: T of `fixed`; None: 64, at most a quarter of the smallest context.
        spans_per_document: target spans of `fixed`.
        min_documents: fewer must not decide about a context.
        stream_tokens: first tokens of each document for `stream`; None: all.
        segment_tokens: of `stream` and `concat`: how much runs at once.
        concat_tokens: length of the joined stream; 0: none.
        growing_tokens: of `stream` and `concat` for models whose state grows: their time per token
            and their memory grow with it.
        flat_margin_nats: differences below it do not matter.
        diverge_nats: a loss so far above that behind the smallest context has diverged.
    """

    contexts: tuple[int, ...]
    span_tokens: int | None = None
    spans_per_document: int = 4
    min_documents: int = stats.LOW_DOCUMENTS
    stream_tokens: int | None = None
    segment_tokens: int = 2048
    concat_tokens: int = 1_048_576
    growing_tokens: int = 16_384
    flat_margin_nats: float = 0.01
    diverge_nats: float = 0.1

    def problems(self) -> list[str]:
        """One line per bad value; empty when all is well."""
        found = []
        if not self.contexts or min(self.contexts) < 1:
            found.append(f"contexts={list(self.contexts)}: at least one, each >= 1")
        for name in (
            "span_tokens",
            "spans_per_document",
            "min_documents",
            "stream_tokens",
            "segment_tokens",
            "growing_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name}={value}: must be at least 1")
        for name in ("flat_margin_nats", "diverge_nats"):
            if not 0 < getattr(self, name) < float("inf"):
                found.append(f"{name}={getattr(self, name)}: must be a positive number of nats")
        return found


def parse_multiples(text: str, train_length: int) -> tuple[int, ...]:
    """Contexts from multiples of the training length: `1/8..256` doubles, `1/2,1,4` is a list.

    Raises:
        ValueError: neither of the two, or a multiple that is no whole number of tokens.
    """
    try:
        if ".." in text:
            first, last = (Fraction(part) for part in text.split(".."))
            if not 0 < first <= last:
                raise ValueError
            multiples = [first]
            while multiples[-1] * 2 <= last:
                multiples.append(multiples[-1] * 2)
        else:
            multiples = [Fraction(part) for part in text.split(",")]
            if min(multiples) <= 0:
                raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"multiples={text} is neither FIRST..LAST nor a list; use 1/8..256 or 1/2,1,4"
        ) from None
    contexts = [multiple * train_length for multiple in multiples]
    broken = [str(m) for m, c in zip(multiples, contexts, strict=True) if c.denominator > 1]
    if broken:
        raise ValueError(
            f"multiples={text}: {', '.join(broken)} of the training length {train_length} is no "
            "whole number of tokens; choose others, or name contexts="
        )
    return tuple(int(context) for context in contexts)


@dataclass(frozen=True)
class Plan:
    """What is scored.

    Attributes:
        contexts: those that enough documents reach, ascending, the training length among them.
        left_out: the others, with the number of documents that reach them.
        passes: of single documents: `fixed` for each context, and `stream`.
        concat: the pass over the joined documents; None without one.
        concat_end: why the joined stream ends where it does.
    """

    contexts: list[int]
    left_out: dict[int, int]
    passes: list[Pass]
    concat: Pass | None
    concat_end: str


def plan(
    model: ScoredModel, documents: EvalDocuments, options: ExtrapolationOptions, train_length: int
) -> Plan:
    """Chooses the contexts that can be measured, and lays out the passes.

    Raises:
        ValueError: an option is wrong, too few documents reach the training length, or the model
            cannot see so much.
    """
    if problems := options.problems():
        raise ValueError("; ".join(problems))
    lengths = documents.lengths
    # Tokens that a state may be carried over.
    most = _least(None if model.constant_state else options.growing_tokens, model.max_tokens)
    asked = sorted({*options.contexts, train_length})
    span = options.span_tokens or protocols.default_span_tokens(asked)
    # EOS is never in a span: a document of n tokens has n - 1 to choose from.
    reach = {c: sum(n - 1 >= c + span for n in lengths) for c in asked}
    contexts = [c for c in asked if reach[c] >= options.min_documents]
    if train_length not in contexts:
        raise ValueError(
            f"min_documents={options.min_documents}: only {reach[train_length]} of "
            f"{len(lengths)} documents have the {train_length + span + 1} tokens that "
            f"a target behind the training length needs; evaluate on more documents (data=, "
            f"split=, limit=) or lower min_documents"
        )
    stream_tokens = _least(options.stream_tokens, most)
    passes = [
        *protocols.fixed(lengths, contexts, span, options.spans_per_document),
        *protocols.stream(lengths, options.segment_tokens, stream_tokens),
    ]
    protocols.check_room(passes, model.max_tokens)
    held = sum(lengths)
    n_tokens = _least(min(options.concat_tokens, held), most)
    joined = concat.concat_pass(n_tokens, options.segment_tokens) if n_tokens else None
    end = "concat_tokens"
    if n_tokens == most:
        end = (
            "the most that a model with a growing state is given (growing_tokens, or its own limit)"
        )
    elif n_tokens == held:
        end = "the evaluated documents hold no more"
    left_out = {c: reach[c] for c in asked if c not in contexts}
    return Plan(contexts, left_out, passes, joined, end)


def _least(*values: int | None) -> Any:
    """The smallest of the values that are given; None when none is."""
    return min((value for value in values if value is not None), default=None)


def run(
    model: ScoredModel,
    documents: EvalDocuments,
    options: ExtrapolationOptions,
    out_dir: Path,
    *,
    name: str,
    train_length: int,
    provenance: dict[str, Any] | None = None,
    processes: Processes | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the suite and writes its files, but for the page.

    Args:
        model: the model, in evaluation mode.
        documents: held-out documents.
        options: what to score.
        out_dir: where the files go; finished passes found there are kept.
        name: the run's name in tables and plots.
        train_length: L0, tokens of a training segment.
        provenance: further facts for `model` in result.json, and `command`.
        processes: that share the work, but for the joined stream; None: this one alone.
        progress: show bars.

    Returns:
        The content of result.json, in every process.

    Raises:
        ValueError: of `plan`, or `out_dir` holds an evaluation of more documents, or one that is
            still going on.
        GateFailure: a gate did not hold; earlier results in `out_dir` are gone by then.
        ProcessLost: another process died or hangs.
    """
    todo = plan(model, documents, options, train_length)
    before = model.fingerprint()
    model_id = model_identity(before, model.precision)
    checked: list[gates.GateResult] = []
    tables: dict[str, TokenTable] = {}

    with results_folder.claim(out_dir, documents, OUTPUTS, processes) as among:
        checked += gates.check_model(model, documents, gates.longest_input(model, train_length))
        gates.require(checked)
        folder = out_dir / "tokens"
        tables |= score_passes(
            model,
            documents,
            todo.passes,
            folder,
            model_id=model_id,
            processes=among,
            progress=progress,
        )

        def write() -> dict[str, Any]:
            passes = list(todo.passes)
            if todo.concat:
                passes.append(todo.concat)
                tables[todo.concat.name] = table = concat.load_or_score(
                    model,
                    documents,
                    todo.concat,
                    folder,
                    model_id=model_id,
                    processes=among,
                    progress=progress,
                )
                checked.append(concat.check_constant_state(model, table))
            for scoring in passes:
                # Beyond the training length a loss that is not finite is a finding.
                within = (scoring.context or np.inf) <= train_length
                table = tables[scoring.name]
                checked.append(gates.check_coverage(scoring, table, finite=within))
            checked.append(gates.check_unchanged(before, model.fingerprint()))
            gates.require(checked)
            facts = {
                "schema": SCHEMA,
                "suite": "extrapolation",
                "name": name,
                **header(model, documents, train_length, provenance or {}),
                "options": {**asdict(options), "contexts": list(options.contexts)},
                "left_out": [{"context": c, "n_docs": n} for c, n in todo.left_out.items()],
                "concat_ends_at": todo.concat_end,
                "protocols": [protocol_record(s, tables[s.name]) for s in passes],
                "gates": [gate.as_dict() for gate in checked],
                "cost": costs(tables),
            }
            facts["model"]["weights_sha256"] = before
            write_bytes(out_dir / FACTS, (json.dumps(facts, indent=1) + "\n").encode())
            return rebuild(out_dir)

        result: dict[str, Any] = among.from_main("result", write)
    return result


def rebuild(out_dir: Path) -> dict[str, Any]:
    """Writes all files of an evaluation but its page anew, from its token store and facts.json.

    Returns:
        The content of result.json: the facts as they are, and everything derived again.

    Raises:
        ValueError: nothing was evaluated there, a pass is missing, or it is not the one that the
            facts are about.
    """
    facts, tables = load_facts(out_dir, SCHEMA)
    result = {**facts, **derive(tables, facts)}
    scalars = [*result["metrics"], *concat_metrics(result["concat"])]
    tensorboard.write(scalars, out_dir, result["model"].get("trained_steps", 0))
    write_bytes(out_dir / "extrapolation.csv", to_csv(result).encode())
    write_bytes(out_dir / "extrapolation.png", plots.to_png(plots.extrapolation_figure(result)))
    write_bytes(out_dir / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    return result
