"""The metrics of the perplexity suite, derived from stored losses alone.

With S the summed loss over a set of tokens and a 95 % interval by document for each:

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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evals import stats
from evals.scoring import protocols
from evals.scoring.store import TokenTable

Metric = dict[str, Any]


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
        with_text = int(table.is_text.sum())
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
