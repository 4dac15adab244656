"""The perplexity suite: score passes, check the gates, derive every metric from the token store.

    OUT/tokens/PASS.npz   per-token losses, the only thing a model was needed for
    OUT/facts.json        identity of model, data and protocols; gates; cost
    OUT/result.json       the same and the metrics
    OUT/curve.csv         the metrics as a table
    OUT/curve.png         bits per byte and gain over context
    OUT/tensorboard       the metrics as scalars

What is scored is kept: a second run with the same weights, data and protocol rescores nothing. On
one machine with one number of threads, `result.json` of an interrupted and resumed run, of one
process or several, differs in `created`, `command` and `cost` only (evals/passes.py says why).

Metrics, with S the summed loss over a set of tokens and a 95 % interval by document for each:

    nll        S / tokens, in nats                  token_ppl   exp(nll)
    word_ppl   exp(S / words) over tokens that stand for text, where all of the text was scored
    bpb        S / (ln 2 bytes) over tokens that stand for text
    bpb_eos    the same with EOS charged, in the numerator only
    gain       nll(C_0) - nll(C), paired: what the context beyond the smallest one buys
    gain_beyond_training   nll(C_L) - nll(C), C_L the largest context within the training length

Curves over contexts (nll, bpb, gains) also have `band95`, which holds the whole curve at once.
"""

import csv
import io
import itertools
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals import gates, plots, protocols, stats, tensorboard
from evals.documents import EvalDocuments
from evals.passes import score_passes
from evals.processes import Processes
from evals.protocols import Pass
from evals.score import ScoredModel, model_identity
from evals.store import TokenTable, write_bytes

SCHEMA = "longspan.eval.perplexity/2"
DEFAULT_PROTOCOLS = ("fixed", "position", "stream", "nonoverlap")
PROTOCOLS = (*DEFAULT_PROTOCOLS, "sliding", "truncate")
FACTS = "facts.json"
OUTPUTS = (FACTS, "result.json", "curve.csv", "curve.png", "report.html", "report.md", "report.png")
"""What a failed evaluation must not leave standing from an earlier one."""

Metric = dict[str, Any]


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


def plan(lengths: Sequence[int], options: PerplexityOptions, train_length: int) -> list[Pass]:
    """All passes of the suite, in the order of `options.protocols`."""
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
    return passes


def check_room(passes: Sequence[Pass], max_tokens: int | None) -> None:
    """Raises:
    ValueError: a pass shows a model more than it can see at once.
    """
    for scoring in passes:
        needed = max(item.stop - 1 - (-1 if item.carry else item.start) for item in scoring.items)
        if max_tokens is not None and needed > max_tokens:
            shorter = {
                "stream": f"stream_tokens={max_tokens}",
                "nonoverlap": f"window_tokens={max_tokens}",
            }
            advice = shorter.get(
                protocols.family(scoring.protocol), f"contexts up to {max_tokens} less span_tokens"
            )
            raise ValueError(
                f"{scoring.protocol}: needs {needed} tokens at once, and the model takes "
                f"{max_tokens}; use {advice}, or other protocols"
            )


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
        ValueError: an option is wrong, no document is long enough, or `out_dir` holds an
            evaluation of more documents.
        GateFailure: a gate did not hold; earlier results in `out_dir` are gone by then.
        ProcessLost: another process died or hangs.
    """
    problems = options.problems()
    if problems:
        raise ValueError("; ".join(problems))
    passes = plan(documents.lengths, options, train_length)
    check_room(passes, model.max_tokens)
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

    check_replaces_no_larger(out_dir, documents)
    with (processes or Processes()).scope() as among:
        if among.is_main:
            for stale in OUTPUTS:
                (out_dir / stale).unlink(missing_ok=True)
            tensorboard.clear(out_dir)
        longest = min(max(2048, 4 * train_length), model.max_tokens or sys.maxsize)
        checked += gates.check_model(model, documents, longest)
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


def load_facts(out_dir: Path, schema: str) -> tuple[dict[str, Any], list[TokenTable]]:
    """facts.json and the passes that it is about.

    Args:
        out_dir: the folder of an evaluation.
        schema: of the suite.

    Raises:
        ValueError: nothing was evaluated there, a pass is missing, or it is another one.
    """
    try:
        facts = json.loads((out_dir / FACTS).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{out_dir / FACTS}: cannot be read ({error}); evaluate again, what is scored is kept"
        ) from error
    if facts["schema"] != schema:
        raise ValueError(
            f"{out_dir / FACTS}: schema={facts['schema']}, this code reads {schema}; evaluate again"
        )
    tables = []
    for record in facts["protocols"]:
        path = out_dir / "tokens" / f"{record['pass']}.npz"
        tables.append(TokenTable.load(path))
        if tables[-1].meta["identity"] != record["identity"]:
            raise ValueError(
                f"{path}: is not the pass that {FACTS} is about; evaluate again, what is scored is "
                "kept"
            )
    return facts, tables


def costs(tables: Mapping[str, TokenTable]) -> list[dict[str, Any]]:
    """Tokens, seconds and memory of every pass."""
    return [
        {"pass": key, "context": table.meta["context"], **table.meta["cost"]}
        for key, table in tables.items()
    ]


def header(
    model: ScoredModel,
    documents: EvalDocuments,
    train_length: int,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """What a result.json says first: what was evaluated, on what, where and when."""
    about_model = dict(provenance)
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": about_model.pop("command", ""),
        "model": {
            **about_model,
            "precision": model.precision,
            "vocab_size": model.vocab_size,
            "reset_grid": model.reset_grid,
            "train_length": train_length,
            "start_id": documents.bos_id,
        },
        "tokenizer": {
            "sha256": documents.tokenizer_sha256,
            "vocab_size": documents.vocab_size,
            "lossless": documents.lossless(),
        },
        "data": {
            **documents.source,
            "fingerprint": documents.fingerprint,
            "text_sha256": documents.text_sha256(),
            "n_docs": len(documents.tokens),
            "n_tokens": sum(documents.lengths),
            "n_bytes": sum(documents.raw_bytes),
        },
        "policy": {
            "start": "each document behind what preceded documents in the model's training",
            "documents": "isolated",
        },
        "env": environment(model.device),
    }


def check_replaces_no_larger(out_dir: Path, documents: EvalDocuments) -> None:
    """A quick look at a few documents must not cost the evaluation of all.

    Raises:
        ValueError: `out_dir` holds an evaluation of more documents of the same text.
    """
    try:
        data = json.loads((out_dir / FACTS).read_bytes())["data"]
    except (OSError, ValueError, KeyError):
        return
    held, given = data["n_docs"], len(documents.tokens)
    same_text = (data["fingerprint"], data.get("split")) == (
        documents.fingerprint,
        documents.source.get("split"),
    )
    if same_text and held > given:
        raise ValueError(
            f"limit={given}: {out_dir} holds an evaluation of {held} documents, which this one "
            f"would replace; use name=quick, or delete the folder"
        )


def derive(tables: Sequence[TokenTable], train_length: int) -> list[Metric]:
    """Every metric of the suite, from the token store alone."""
    metrics: list[Metric] = []
    bands = curve_bands(tables, [_level_sums(table) for table in tables])
    for table, band in zip(tables, bands, strict=True):
        for metric in _level_metrics(table):
            edges = band.get(metric["name"])
            metrics.append({**metric, "band95": list(edges) if edges else None})
        if table.meta["protocol"] in ("position", "stream"):
            metrics += _position_metrics(table)
    fixed = [table for table in tables if table.meta["protocol"].startswith("fixed")]
    if len(fixed) > 1:
        metrics += _gain_metrics("gain", fixed[0], fixed[1:])
        within = [table for table in fixed if table.meta["context"] <= train_length]
        beyond = fixed[len(within) :]
        if within and beyond:
            metrics += _gain_metrics("gain_beyond_training", within[-1], beyond)
    return metrics


Sums = tuple[np.ndarray, np.ndarray]
"""Numerators and denominators of one quantity, (n_docs,) each."""


def curve_bands(
    tables: Sequence[TokenTable], measured: Sequence[Mapping[str, Sums]]
) -> list[dict[str, tuple[float, float]]]:
    """The simultaneous bands of all curves over contexts.

    Args:
        tables: passes; those of one protocol with several settings are the points of one curve, and
            so are the same passes of several pairs of models.
        measured: for each table, what was measured there, by metric.

    Returns:
        For each table, by metric, its edges of the band that holds the whole curve at once; nothing
        where the pass is no point of a curve, or there is one document.
    """
    curves: dict[tuple[str, str], list[int]] = {}
    for k, table in enumerate(tables):
        for metric in measured[k]:
            curves.setdefault((protocols.family(table.meta["protocol"]), metric), []).append(k)
    bands: list[dict[str, tuple[float, float]]] = [{} for _ in tables]
    for (_, metric), curve in curves.items():
        if len(curve) == 1:
            continue
        sums, weights = (
            np.stack([measured[k][metric][side] for k in curve], axis=1) for side in (0, 1)
        )
        band = stats.simultaneous_band(sums, weights)
        if band is not None:
            for k, (low, high) in zip(curve, band.tolist(), strict=True):
                bands[k][metric] = (low, high)
    return bands


def _level_sums(table: TokenTable) -> dict[str, Sums]:
    sums = {"nll": table.nats_and_tokens(), "bpb": table.bits_and_bytes()}
    return {name: pair for name, pair in sums.items() if pair[1].sum()}


def _level_metrics(table: TokenTable) -> list[Metric]:
    nats, tokens = table.nats_and_tokens()
    bits, n_bytes = table.bits_and_bytes()
    nll = stats.ratio(nats, tokens)
    metrics = [
        _metric("nll", "nats/token", table, nll),
        _metric("token_ppl", "per token", table, _exponential(nll)),
    ]
    if n_bytes.sum():
        with_text = int((table.n_bytes > 0).sum())
        if table.meta["n_words"]:
            per_word = stats.ratio(bits * np.log(2.0), table.meta["n_words"], with_text)
            metrics.append(_metric("word_ppl", "per word", table, _exponential(per_word)))
        metrics.append(_metric("bpb", "bits/byte", table, stats.ratio(bits, n_bytes, with_text)))
        if with_text < len(table.nll):
            charged = stats.ratio(nats / np.log(2.0), n_bytes, len(table.nll))
            metrics.append(_metric("bpb_eos", "bits/byte", table, charged))
    return metrics


def _exponential(loss: stats.Estimate) -> stats.Estimate:
    """A perplexity of a mean loss; its error by the delta method, its interval's edges exactly."""
    value = float(np.exp(loss.value))
    return replace(
        loss,
        value=value,
        se=None if loss.se is None else value * loss.se,
        ci95=loss.ci95 and (float(np.exp(loss.ci95[0])), float(np.exp(loss.ci95[1]))),
    )


def _position_metrics(table: TokenTable) -> list[Metric]:
    """l(i) in log-spaced buckets of position."""
    edges = protocols.log_buckets(int(table.position.max()) + 1)
    metrics = []
    for low, high in itertools.pairwise(edges):
        rows = (table.position >= low) & (table.position < high)
        nats, tokens = table.select(rows).nats_and_tokens()
        metric = _metric("nll_at_position", "nats/token", table, stats.ratio(nats, tokens))
        metrics.append({**metric, "position": [int(low), int(high)]})
    return metrics


def _gain_metrics(name: str, base: TokenTable, others: Sequence[TokenTable]) -> list[Metric]:
    """Paired gains over one context, with a band that holds all of them at once."""
    base_nats, tokens = base.nats_and_tokens()
    gains = np.stack([base_nats - other.nats_and_tokens()[0] for other in others], axis=1)
    band = stats.simultaneous_band(gains, np.repeat(tokens[:, None], len(others), axis=1))
    metrics = []
    for k, other in enumerate(others):
        metric = _metric(name, "nats/token", other, stats.ratio(gains[:, k], tokens))
        edges = None if band is None else band[k].tolist()
        metrics.append({**metric, "baseline_context": base.meta["context"], "band95": edges})
    return metrics


def _metric(name: str, unit: str, table: TokenTable, estimate: stats.Estimate) -> Metric:
    return {
        "name": name,
        "unit": unit,
        "protocol": table.meta["protocol"],
        "context": table.meta["context"],
        **estimate.as_dict(),
    }


def protocol_record(scoring: Pass, table: TokenTable) -> dict[str, Any]:
    """What a result.json says of a pass."""
    return {
        "pass": scoring.name,
        "id": scoring.protocol,
        "context": scoring.context,
        "settings": scoring.settings,
        "identity": table.meta["identity"],
        "n_docs": len(np.unique(table.doc)),
        "n_tokens": len(table.nll),
        "context_seen": [int(table.context.min()), int(table.context.max())],
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware behind the numbers."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "machine": platform.machine(),
    }


def curve_csv(metrics: Sequence[Metric], more_columns: Sequence[str] = ()) -> str:
    """All metrics as one table."""
    columns = "protocol name unit context position_from position_to value se ci95_low ci95_high"
    columns += " band95_low band95_high n_docs n_tokens n_docs_low"
    text = io.StringIO()
    writer = csv.DictWriter(
        text, [*columns.split(), *more_columns], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    for metric in metrics:
        row = dict(metric)
        for key, targets in (
            ("position", ("position_from", "position_to")),
            ("ci95", ("ci95_low", "ci95_high")),
            ("band95", ("band95_low", "band95_high")),
        ):
            row.update(zip(targets, row.get(key) or (), strict=False))
        writer.writerow(row)
    return text.getvalue()
