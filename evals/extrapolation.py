"""The extrapolation suite: what contexts beyond the training length L0 are worth and cost.

    OUT/tokens/PASS.npz      per-token losses; everything else is derived from them
    OUT/facts.json           identity of model, data and protocols; gates; cost
    OUT/result.json          the same, and metrics, verdicts, effective context, concat
    OUT/extrapolation.csv    the metrics as a table, a verdict beside each gain beyond L0
    OUT/extrapolation.png    the figure; OUT/report.html the page; OUT/tensorboard the scalars

Contexts are multiples of L0, by default L0/8 .. 256 L0. Protocols, see `evals.protocols`: `fixed`
for the gains, over one set of target spans, so over those documents only that reach the largest
context; `stream` for the loss by position; `concat` for what no document is long enough for, see
`evals.concat`. A context that fewer than `min_documents` documents reach is left out, its verdict
`n_docs_low`: it would take the others down to those few documents.

    G(C) = nll(C_ref) - nll(C)      paired by document, with a band that holds all C at once

Metrics are those of `evals.perplexity`: `gain` from the smallest context, `gain_beyond_training`
from L0. A verdict compares C > L0 with L0 and is the first of these that holds (`judge`):

    diverges    a loss is not finite, or the loss is above that behind the smallest context by more
                than `diverge_nats`: the whole band of `gain` lies below -diverge_nats
    flat        the band of `gain_beyond_training` lies within +-`flat_margin_nats`: there is no
                difference that matters, be there a small one or none
    gains       it lies above 0
    degrades    it lies below 0
    undecided   none of these: no difference is shown, and none that matters is excluded

Effective context, for a margin m = `flat_margin_nats`: the smallest C of the grid from which no
larger one gains more than m,

    min {C : nll(C) - min_{C' >= C} nll(C') <= m}

with a 95 % percentile interval over resampled documents. It is a point of the grid: a model that
uses K tokens has the smallest C >= K. At the end of the grid it says "at least". Beside it stands
`shown_context`, the largest C whose gain over the next smaller one is shown by a band over all
such steps: what is certainly used.

Surprising: a sliding-window model is `flat` and has not extrapolated anything; it sees no further.
Look at the gains within the training length too.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from evals import concat, gates, plots, protocols, results_folder, stats, tensorboard
from evals.documents import EvalDocuments
from evals.facts import FACTS, costs, header, load_facts, protocol_record
from evals.metrics import Metric, curve_csv
from evals.metrics import derive as level_metrics
from evals.passes import score_passes
from evals.processes import Processes
from evals.protocols import Pass
from evals.score import ScoredModel, model_identity
from evals.store import TokenTable, write_bytes

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
        longest = min(max(2048, 4 * train_length), model.max_tokens or sys.maxsize)
        checked += gates.check_model(model, documents, longest)
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


def derive(tables: Sequence[TokenTable], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything that the suite says, from the token store alone.

    Args:
        tables: the passes of `fixed` by ascending context, `stream`, and `concat` if there is one.
        facts: the options, the training length, and what was left out.
    """
    options, train_length = ExtrapolationOptions(**facts["options"]), facts["model"]["train_length"]
    families: dict[str, list[TokenTable]] = {"fixed": [], "stream": [], "concat": []}
    for table in tables:
        families[protocols.family(table.meta["protocol"])].append(table)
    finite = [table for table in families["fixed"] if np.isfinite(table.nll).all()]
    (stream,) = families["stream"]
    finite_stream, stream_bad = _before_non_finite(stream)
    metrics = level_metrics([*finite, finite_stream], train_length)
    verdicts = [
        _verdict(table, metrics, options, train_length)
        for table in families["fixed"]
        if table.meta["context"] > train_length
    ]
    verdicts += [
        {
            "context": row["context"],
            "multiple": row["context"] / train_length,
            "verdict": "n_docs_low",
            "value": None,
            "band95": None,
            "n_docs": row["n_docs"],
            "n_docs_low": True,
            "non_finite_tokens": 0,
        }
        for row in facts["left_out"]
    ]
    joined = [_concat_record(table, stream, options) for table in families["concat"]]
    return {
        "metrics": metrics,
        "verdicts": sorted(verdicts, key=lambda row: row["context"]),
        "effective_context": effective_context(finite, options.flat_margin_nats),
        "stream_non_finite_from": stream_bad,
        "concat": joined[0] if joined else None,
    }


def _before_non_finite(table: TokenTable) -> tuple[TokenTable, int | None]:
    """The rows at positions before the first loss that is not finite, and that position."""
    bad = table.position[~np.isfinite(table.nll)]
    if not len(bad):
        return table, None
    return table.select(table.position < bad.min()), int(bad.min())


def judge(
    gain: float,
    interval: Sequence[float] | None,
    margin: float,
) -> str:
    """A gain in words, from an interval that covers it; see the module's docstring."""
    if interval is not None and -margin <= interval[0] and interval[1] <= margin:
        return "flat"
    return {1: "gains", -1: "degrades", 0: "undecided"}[stats.sign_of(gain, interval)]


def _verdict(
    table: TokenTable,
    metrics: Sequence[Metric],
    options: ExtrapolationOptions,
    train_length: int,
) -> dict[str, Any]:
    context = table.meta["context"]
    by_name = {m["name"]: m for m in metrics if m["context"] == context}
    beyond, overall = by_name.get("gain_beyond_training"), by_name.get("gain")
    if beyond is None or overall is None:
        word = "diverges"
    else:
        band = overall["band95"]
        lost = band is not None and band[1] < -options.diverge_nats
        word = judge(beyond["value"], beyond["band95"], options.flat_margin_nats)
        word = "diverges" if lost else word
    n_docs = len(np.unique(table.doc))
    return {
        "context": context,
        "multiple": context / train_length,
        "verdict": word,
        "value": beyond and beyond["value"],
        "band95": beyond and beyond["band95"],
        "n_docs": n_docs,
        "n_docs_low": n_docs < stats.LOW_DOCUMENTS,
        "non_finite_tokens": int((~np.isfinite(table.nll)).sum()),
    }


def effective_context(
    fixed: Sequence[TokenTable],
    margin: float,
    draws: int = stats.DEFAULT_DRAWS,
    seed: int = 0,
) -> dict[str, Any]:
    """The effective context and the shown one; see the module's docstring.

    Args:
        fixed: the passes of `fixed` with finite losses, by ascending context.
        margin: in nats.
        draws: resamplings of documents.
        seed: of numpy's generator.
    """
    contexts = np.array([table.meta["context"] for table in fixed])
    nats = np.stack([table.nats_and_tokens()[0] for table in fixed], axis=1)
    tokens = fixed[0].nats_and_tokens()[1]
    nats, tokens = nats[tokens > 0], tokens[tokens > 0]
    n = len(tokens)
    value = int(contexts[_first_enough(nats.sum(0) / tokens.sum(), margin)])
    interval = None
    if n > 1:
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(n, np.full(n, 1.0 / n), size=draws)
        index = _first_enough(counts @ nats / (counts @ tokens)[:, None], margin)
        low, high = np.quantile(index, [0.025, 0.975], method="inverted_cdf")
        interval = [int(contexts[low]), int(contexts[high])]
    return {
        "value": value,
        "ci95": interval,
        "margin_nats": margin,
        "at_grid_end": value == int(contexts[-1]),
        "at_grid_start": value == int(contexts[0]),
        "shown_context": _shown_context(contexts, nats, tokens),
        "n_docs": n,
        "n_docs_low": n < stats.LOW_DOCUMENTS,
    }


def _shown_context(contexts: np.ndarray, nats: np.ndarray, tokens: np.ndarray) -> int | None:
    """The largest context with a shown gain over the one before it, or None.

    Steps that are rounding in every document are left out: they would widen the others' band.

    Args:
        contexts: (k,) ascending.
        nats: (n_docs, k) summed losses.
        tokens: (n_docs,) above 0.
    """
    steps = nats[:, :-1] - nats[:, 1:]
    tested = np.flatnonzero((np.abs(steps) >= stats.RESOLUTION * tokens[:, None]).any(axis=0))
    if not len(tested):
        return None
    steps = steps[:, tested]
    band = stats.simultaneous_band(steps, np.repeat(tokens[:, None], len(tested), axis=1))
    if band is None:
        return None
    values = steps.sum(0) / tokens.sum()
    gaining = [k for k in range(len(tested)) if stats.sign_of(values[k], band[k]) > 0]
    return int(contexts[tested[gaining[-1]] + 1]) if gaining else None


def _first_enough(nll: np.ndarray, margin: float) -> np.ndarray:
    """(..., k) losses over ascending contexts -> (...) index of the effective one."""
    best_from_here = np.minimum.accumulate(nll[..., ::-1], axis=-1)[..., ::-1]
    return np.argmax(nll - best_from_here <= margin, axis=-1)


def _concat_record(
    table: TokenTable,
    stream: TokenTable,
    options: ExtrapolationOptions,
) -> dict[str, Any]:
    found = concat.stability(table, stream)
    drift, word = found["drift"], "undecided"
    if found["non_finite_from"] is not None:
        word = "diverges"
    elif drift:
        interval = [-edge for edge in reversed(drift["ci95"])]
        word = judge(-drift["value"], interval, options.flat_margin_nats)
        word = "diverges" if interval[1] < -options.diverge_nats else word
    return {
        "tokens": len(table.nll),
        "n_docs": len(table.meta["doc_lengths"]),
        "verdict": word,
        **found,
        "marks": concat.marks(table),
    }


def concat_metrics(record: dict[str, Any] | None) -> list[Metric]:
    """The joined stream's windows and marks as records like the other metrics."""
    if record is None:
        return []
    return [
        {"protocol": "concat", "name": name, "unit": unit, "context": None, **point}
        for part, name, unit in (
            ("windows", "nll", "nats/token"),
            ("windows", "excess", "nats/token"),
            ("marks", "seconds_per_token", "s"),
            ("marks", "state_bytes", "bytes"),
            ("marks", "peak_memory_bytes", "bytes"),
        )
        for point in (
            {"position": row.get("position", [0, row.get("tokens")]), "value": row[name]}
            for row in record[part]
        )
    ]


def to_csv(result: dict[str, Any]) -> str:
    """All metrics as one table, with multiples and verdicts, and the joined stream."""
    words = {row["context"]: row["verdict"] for row in result["verdicts"]}
    rows = []
    for metric in [*result["metrics"], *concat_metrics(result["concat"])]:
        row = dict(metric)
        if row["context"]:
            row["multiple"] = row["context"] / result["model"]["train_length"]
        if row["name"] == "gain_beyond_training":
            row["verdict"] = words[row["context"]]
        rows.append(row)
    return curve_csv(rows, ("multiple", "verdict"))
