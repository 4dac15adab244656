"""Training curves of many runs: one row per model, its best learning rate, against a baseline.

Reads what training wrote (metrics.jsonl, config.yaml, the last checkpoint's training.json); nothing
is evaluated again. Runs are of one row when their names differ in `learning_rate` and `seed` only,
as launch/sweep.py names them. Per row the learning rate with the lowest validation loss is shown,
as a mean over its seeds.

Compared are losses per token, so everything that defines a token or what it costs to learn from it
must be equal: text, tokenizer, batch, tokens, schedule, optimizer.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from evals import plots
from pretrain.config import RunConfig, differences, load_saved_config

# Okabe and Ito's palette without its yellow, which is too light for a line on white; then again
# with another line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
STYLES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
LINES = [(colour, style) for style in STYLES for colour in COLOURS]
VARIED = r"_(?:learning_rate|seed)[^_]*"
# What may differ; also the model, but for its vocabulary, between rows.
FREE = (
    "name",
    "out_dir",
    "seed",
    "optim.learning_rate",
    "train.micro_batch_size",
    "train.compile",
    "train.cuda_graphs",
    "train.deterministic",
    "data.path",  # what lies there is compared
    "data.prefetch_steps",
)
FREE_IN_ROWS = ("train.carry_state",)  # full attention has no state of constant size
FREE_SECTIONS = ("zero.", "logging.", "checkpoint.", "resume.", "profile.")
BOUND = 0.1  # of the baseline's loss: a row beyond it is marked
SMOOTHING = 1.15  # a point is the mean from tokens / SMOOTHING to tokens: as wide everywhere in log


@dataclass(frozen=True)
class TrainingRun:
    """One finished run.

    Attributes:
        row: its name without learning rate and seed.
        config: as trained.
        corpus: fingerprints of text and tokenizer.
        tokens: (K,) tokens seen at each logged row.
        loss: (K,) mean loss in nats per token since the row before.
        validation_bpb: bits per byte at the end.
    """

    row: str
    config: RunConfig
    corpus: tuple[str, str]
    tokens: np.ndarray
    loss: np.ndarray
    validation_bpb: float

    def final_loss(self, steps: int) -> float:
        """Mean loss over the last `steps` optimizer steps, in nats per token."""
        first = self.tokens[-1] - steps * self.config.train.global_batch_tokens
        before = np.concatenate([[0], self.tokens[:-1]])
        weight = np.maximum(0, self.tokens - np.maximum(before, first))
        return float(np.average(self.loss, weights=weight))


@dataclass(frozen=True)
class Row:
    """A model at its best learning rate; several values are one per seed.

    Attributes:
        runs: of that learning rate.
        loss: final training loss, nats per token.
        validation_bpb: bits per byte.
        learning_rates: all that were tried.
    """

    name: str
    runs: list[TrainingRun]
    loss: np.ndarray
    validation_bpb: np.ndarray
    learning_rates: list[float]

    @property
    def learning_rate(self) -> float:
        return self.runs[0].config.optim.learning_rate


def load_run(path: Path) -> TrainingRun | None:
    """Reads a run directory; None where training has not finished.

    Raises:
        ValueError: no run directory, or a run that was never validated.
    """
    if path.is_dir() and not (path / "DONE").exists():  # one that failed may have no more than that
        return None
    config = load_saved_config(path / "config.yaml")
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    logged = [row for row in rows if "loss" in row]
    validated = [row for row in rows if "val/bpb" in row]
    if not validated:
        raise ValueError(f"{path}: it was never validated; train with eval.documents > 0")
    tag = (path / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    training = json.loads((path / "checkpoints" / tag / "training.json").read_text("utf-8"))
    return TrainingRun(
        row=re.sub(VARIED, "", config.name),
        config=config,
        corpus=(training["data"]["fingerprint"], training["tokenizer"]),
        tokens=np.array([row["tokens"] for row in logged]),
        loss=np.array([row["loss"] for row in logged]),
        validation_bpb=validated[-1]["val/bpb"],
    )


def check_comparable(runs: Sequence[TrainingRun]) -> None:
    """Refuses runs whose losses do not compare.

    Raises:
        ValueError: every difference, by key, run and value.
    """
    problems = []
    row_first: dict[str, TrainingRun] = {}
    for run in runs:
        first, twin = runs[0], row_first.setdefault(run.row, run)
        pair = f"{first.config.name} and {run.config.name}"
        for what, theirs, ours in zip(("text", "tokenizer"), first.corpus, run.corpus, strict=True):
            if ours != theirs:
                problems.append(f"{pair} have another {what}: {theirs[:16]}, {ours[:16]}")
        for key, (theirs, ours) in differences(run.config, first.config).items():
            free = key in FREE or key in FREE_IN_ROWS or key.startswith(FREE_SECTIONS)
            if key == "model.vocab_size" or not (free or key.startswith("model.")):
                problems.append(f"{pair} differ in {key}: {theirs}, {ours}")
        pair = f"{twin.config.name} and {run.config.name}, of one row,"
        for key, (theirs, ours) in differences(run.config, twin.config).items():
            if key in FREE_IN_ROWS or key.startswith("model."):
                problems.append(f"{pair} differ in {key}: {theirs}, {ours}")
    if problems:
        raise ValueError("runs that do not compare:\n" + "\n".join(problems))


def rows_of(runs: Sequence[TrainingRun], last_steps: int) -> list[Row]:
    """One row per model at its best learning rate by validation loss, lowest final loss first."""
    rows = []
    for name in dict.fromkeys(run.row for run in runs):
        by_rate: dict[float, list[TrainingRun]] = {}
        for run in (run for run in runs if run.row == name):
            by_rate.setdefault(run.config.optim.learning_rate, []).append(run)
        best = min(
            by_rate.values(), key=lambda found: np.mean([run.validation_bpb for run in found])
        )
        rows.append(
            Row(
                name,
                best,
                np.array([run.final_loss(last_steps) for run in best]),
                np.array([run.validation_bpb for run in best]),
                sorted(by_rate),
            )
        )
    return sorted(rows, key=lambda row: row.loss.mean())


def table(rows: Sequence[Row], baseline: Row) -> list[dict[str, Any]]:
    """A record per row, for printing and for CSV."""
    records = []
    for row in rows:
        relative = row.loss.mean() / baseline.loss.mean() - 1
        rates = row.learning_rates
        at_edge = len(rates) > 1 and row.learning_rate in (rates[0], rates[-1])
        records.append(
            {
                "row": row.name,
                "seeds": len(row.runs),
                "learning_rate": row.learning_rate,
                "at_edge_of_sweep": at_edge,
                "train_loss": row.loss.mean(),
                "train_loss_spread": np.ptp(row.loss),
                "validation_bpb": row.validation_bpb.mean(),
                "validation_bpb_spread": np.ptp(row.validation_bpb),
                "relative_loss": relative,
                "outside_bound": abs(relative) > BOUND,
            }
        )
    return records


def to_csv(records: Sequence[dict[str, Any]]) -> str:
    """The records with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_markdown(records: Sequence[dict[str, Any]], baseline: str) -> str:
    """The records as a table; spreads are largest minus smallest over seeds."""
    lines = [
        f"| row | learning rate | seeds | train loss | validation bpb | loss vs. {baseline} | |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        spread = (
            [f" ({r[f'{key}_spread']:.4f})" for key in ("train_loss", "validation_bpb")]
            if r["seeds"] > 1
            else ["", ""]
        )
        edge = ", edge of the sweep" if r["at_edge_of_sweep"] else ""
        outside = f"outside {BOUND:.0%}" if r["outside_bound"] else ""
        lines.append(
            f"| {r['row']} | {r['learning_rate']:g}{edge} | {r['seeds']} "
            f"| {r['train_loss']:.4f}{spread[0]} | {r['validation_bpb']:.4f}{spread[1]} "
            f"| {r['relative_loss']:+.2%} | {outside} |"
        )
    return "\n".join(lines)


def figure(rows: Sequence[Row], baseline: Row) -> Figure:
    """Loss over tokens, and the difference to the baseline in per cent; labels in order of loss.

    Raises:
        ValueError: more rows than lines that can be told apart.
    """
    if len(rows) > len(LINES) + 1:
        raise ValueError(f"{len(rows)} rows: at most {len(LINES) + 1} can be told apart in a plot")
    others = iter(LINES)
    looks: list[dict[str, Any]] = []
    for row in rows:
        colour, style = ("black", "-") if row is baseline else next(others)
        width = 2.4 if row is baseline else 1.5
        looks.append({"color": colour, "linestyle": style, "linewidth": width})
    drawn = [_curve(row) for row in rows]
    reference = _curve(baseline)
    last = reference[0][-1]
    with matplotlib.rc_context(plots.STYLE):
        page = Figure(figsize=(13, 6), layout="constrained")
        left, right = page.subplots(1, 2, width_ratios=(1, 1.5))
        _draw(left, drawn, looks, first=last / 60)
        left.set(xscale="log", xlabel="tokens (millions)", ylabel="nats per token")
        left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.set_title("Training loss")
        relative = [(x, 100 * (loss / np.interp(x, *reference) - 1)) for x, loss in drawn]
        _draw(right, relative, looks, first=last / 6)
        low, high = right.get_ylim()  # one row far off must not flatten all others
        right.set_ylim(max(low, -200 * BOUND), min(high, 200 * BOUND))
        right.set(xlabel="tokens (millions)", ylabel=f"per cent (dotted: {BOUND:.0%})")
        right.set_title(f"Training loss against {baseline.name}, below 0: better")
        for sign in (-1, 1):
            right.axhline(sign * 100 * BOUND, color=plots.REFERENCE_COLOUR, lw=0.9, ls=(0, (1, 2)))
        labels = [f"{row.name}  {row.loss.mean():.3f}" for row in rows]
        ends = np.clip([curve[-1] for _, curve in relative], *right.get_ylim())
        _label_ends(right, ends.tolist(), labels, looks)
    return page


def _curve(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Millions of tokens, and the smoothed loss as a mean over seeds."""
    tokens = row.runs[0].tokens
    loss = np.mean([np.interp(tokens, run.tokens, run.loss) for run in row.runs], axis=0)
    total = np.concatenate([[0.0], np.cumsum(loss)])
    stop = np.arange(1, len(tokens) + 1)
    start = np.minimum(np.searchsorted(tokens, tokens / SMOOTHING), stop - 1)
    return tokens / 1e6, (total[stop] - total[start]) / (stop - start)


def _draw(
    axis: Axes,
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
    looks: Sequence[dict[str, Any]],
    *,
    first: float,
) -> None:
    """Curves from `first` on, the best on top; limits fit what is seen."""
    seen = np.concatenate([y[x >= first] for x, y in curves])
    margin = max(0.04 * np.ptp(seen), 1e-3)
    for (x, y), look in reversed(list(zip(curves, looks, strict=True))):
        axis.plot(x, y, **look)
    axis.set_xlim(first, max(x[-1] for x, _ in curves))
    axis.set_ylim(seen.min() - margin, seen.max() + margin)


def _label_ends(
    axis: Axes, ends: Sequence[float], labels: Sequence[str], looks: Sequence[dict[str, Any]]
) -> None:
    """Labels beside the axis, the first one lowest, each led by its line from its curve's end."""
    low, high = axis.get_ylim()
    gap = (high - low) / max(24, len(labels))
    up, down = list(ends), list(ends)
    for k in range(1, len(ends)):
        up[k] = max(up[k], up[k - 1] + gap)
        down[-1 - k] = min(down[-1 - k], down[-k] - gap)
    places = [(a + b) / 2 for a, b in zip(up, down, strict=True)]  # apart too, and in the middle
    for k in range(len(places)):
        places[k] = max(places[k], low if k == 0 else places[k - 1] + gap)
    for k in reversed(range(len(places))):
        places[k] = min(places[k], high if k + 1 == len(places) else places[k + 1] - gap)
    for end, place, label, look in zip(ends, places, labels, looks, strict=True):
        axis.plot(
            [1, 1.03, 1.09],
            [end, place, place],
            transform=axis.get_yaxis_transform(),
            clip_on=False,
            **{**look, "linewidth": 1.2},
        )
        axis.text(1.1, place, label, transform=axis.get_yaxis_transform(), va="center", fontsize=9)


def write(
    paths: Sequence[Path],
    out_dir: Path,
    *,
    baseline: str,
    last_steps: int = 50,
) -> str:
    """Writes curves.png, rows.csv and rows.md into `out_dir`.

    Returns:
        The table as Markdown, with a line for each run that is left out.

    Raises:
        ValueError: nothing finished, runs that do not compare, no row of the baseline's name.
    """
    found = {path: load_run(path) for path in paths}
    left_out = [f"left out: {path} has not finished" for path, run in found.items() if run is None]
    runs = [run for run in found.values() if run is not None]
    if not runs:
        raise ValueError("none of the runs has finished; train them first")
    check_comparable(runs)
    rows = rows_of(runs, last_steps)
    reference = next((row for row in rows if row.name == baseline), None)
    if reference is None:
        names = ", ".join(row.name for row in rows)
        raise ValueError(f"baseline={baseline}: no such row; choose from {names}")
    records = table(rows, reference)
    text = "\n".join([to_markdown(records, baseline), *left_out])
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "rows.csv").write_text(to_csv(records), encoding="utf-8")
    (out_dir / "rows.md").write_text(text + "\n", encoding="utf-8")
    (out_dir / "curves.png").write_bytes(plots.to_png(figure(rows, reference)))
    return text
