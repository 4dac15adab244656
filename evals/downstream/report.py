"""From answers to the table: every metric with its interval, and paired differences.

Intervals are over examples (evals/downstream/intervals.py), of the mean over seeds. The spread of
seeds is a matter of its own: their scores are listed one by one, and a difference between trainings
of several seeds has Welch's interval over these beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.processes import map_processes
from evals.downstream.examples import Example
from evals.downstream.intervals import difference, interval
from evals.downstream.metrics import INVALID, METRICS, combine, contributions
from evals.downstream.outputs import Outputs, collect, read_settings
from evals.downstream.rouge import MEASURES, SPLITTER
from evals.stats import welch

DIVERGED = " diverged"


@dataclass(frozen=True)
class Comparison:
    """Several models on the tests of one task.

    Attributes:
        task: name.
        metrics: the first one is compared.
        labels: of the task.
        rows: baselines first.
        examples: by test.
        baseline: name of the row that all are compared with.
    """

    task: str
    metrics: list[str]
    labels: list[str]
    rows: list[Outputs]
    examples: dict[str, list[Example]]
    baseline: str


def compare(folders: Sequence[Path], baseline: str = "") -> Comparison:
    """Opens what several fine-tunings left.

    Args:
        folders: each an out= of launch/finetune.py.
        baseline: row to compare with; "": the last folder, or the task's baseline if there is one
            folder only.

    Raises:
        ValueError: another task or other test examples, two folders of one name, no such baseline.
    """
    settings = [read_settings(folder) for folder in folders]
    baselines, _, examples = collect(folders[0])
    rows = list(baselines)
    task = settings[0]["task"]
    for folder, setting in zip(folders, settings, strict=True):
        _, outputs, theirs = collect(folder)
        for key in ("name", "metrics"):
            if setting["task"][key] != task[key]:
                raise ValueError(
                    f"{folder}: its task's {key} is {setting['task'][key]}, that of {folders[0]} "
                    f"is {task[key]}; compare one task"
                )
        if theirs != examples:
            raise ValueError(
                f"{folder}: its test examples are not those of {folders[0]}; fine-tune both with "
                f"the same test= and test_examples="
            )
        if outputs.name in [row.name for row in rows]:
            raise ValueError(f"{folder}: two rows are called {outputs.name}; rename one folder")
        rows.append(outputs)
    names = [row.name for row in rows]
    if not baseline:
        baseline = names[-1] if len(folders) > 1 else names[0]
    if baseline not in names:
        raise ValueError(f"baseline={baseline} is no row; there are: {', '.join(names)}")
    return Comparison(
        task["name"], task["metrics"], settings[0]["labels"], rows, examples, baseline
    )


def records(comparison: Comparison, workers: int = 1) -> list[dict[str, Any]]:
    """One record per test and row.

    Args:
        comparison: what is scored.
        workers: processes for ROUGE; other metrics are faster than starting any.
    """
    found = []
    if METRICS[comparison.metrics[0]].kind != "generation":
        workers = 1
    for test, examples in comparison.examples.items():
        score = partial(_scores, comparison.metrics, examples, comparison.labels)
        answers = [texts for row in comparison.rows for texts in row.tests[test]]
        scored = iter(map_processes(score, answers, workers))
        scores = {row.name: list(islice(scored, len(row.tests[test]))) for row in comparison.rows}
        for row in comparison.rows:
            found.append({"task": comparison.task, "test": test, "model": row.name})
            found[-1] |= _record(comparison, scores, row, len(examples))
    return found


def _scores(
    metrics: Sequence[str], examples: Sequence[Example], labels: Sequence[str], texts: Sequence[str]
) -> dict[str, np.ndarray]:
    return contributions(metrics, texts, examples, labels)


def _record(
    comparison: Comparison, scores: dict[str, list[dict[str, np.ndarray]]], row: Outputs, n: int
) -> dict[str, Any]:
    ours, theirs = scores[row.name], scores[comparison.baseline]
    first = comparison.metrics[0]

    def each_seed(seeds: list[dict[str, np.ndarray]]) -> list[float]:
        return [combine(first, seed[first]) for seed in seeds]

    record: dict[str, Any] = {
        "examples": n,
        "metrics": {
            metric: interval(metric, [seed[metric] for seed in ours])._asdict()
            for metric in ours[0]
        },
        "per_seed": each_seed(ours),
        "diverged": row.diverged,
    }
    if row.name != comparison.baseline:
        gap = difference(first, [seed[first] for seed in ours], [seed[first] for seed in theirs])
        over_seeds = welch(each_seed(ours), each_seed(theirs))
        record["difference"] = {"over": comparison.baseline, **gap._asdict(), "seeds": over_seeds}
    return record


def by_task(folders: Sequence[Path]) -> list[list[Path]]:
    """Folders of one task together, in the order of each task's first."""
    groups: dict[str, list[Path]] = {}
    for folder in folders:
        groups.setdefault(read_settings(folder)["task"]["name"], []).append(folder)
    return list(groups.values())


def overview(found: Sequence[dict[str, Any]], comparisons: Sequence[Comparison]) -> str:
    """One table of several tasks: a line per test, a column per model, the first metric of each.

    Args:
        found: records of all comparisons.
        comparisons: one per task.
    """
    models = list(dict.fromkeys(row.name for c in comparisons for row in c.rows))
    lines = [
        f"| task | metric, % | examples | {' | '.join(models)} |",
        "|---" * (3 + len(models)) + "|",
    ]
    for comparison in comparisons:
        for test in comparison.examples:
            rows = {
                r["model"]: r for r in found if (r["task"], r["test"]) == (comparison.task, test)
            }
            examples = next(iter(rows.values()))["examples"]
            cells = [comparison.task, comparison.metrics[0], f"{examples:,}"]
            cells += [
                _overview_cell(rows[name], comparison.metrics[0]) if name in rows else ""
                for name in models
            ]
            lines.append(f"| {' | '.join(cells)} |")
    baselines = ", ".join(dict.fromkeys(comparison.baseline for comparison in comparisons))
    lines += ["", f"In brackets: the difference over {baselines}; bold where it excludes zero."]
    return "\n".join(lines)


def _overview_cell(record: dict[str, Any], metric: str) -> str:
    value, gap = record["metrics"][metric]["value"], record.get("difference")
    shown = f"{value:.1f}{DIVERGED * any(record['diverged'])}"
    if gap is None:
        return shown
    cell = f"{shown} ({gap['value']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}])"
    return f"**{cell}**" if gap["low"] > 0 or gap["high"] < 0 else cell


def markdown(found: Sequence[dict[str, Any]], comparison: Comparison) -> str:
    """A table per test."""
    first = comparison.metrics[0]
    shown = [*comparison.metrics, *([INVALID] if INVALID in found[0]["metrics"] else [])]
    head = ["model", *shown, f"{first}, each seed", f"{first} over {comparison.baseline}", "seeds"]
    lines = []
    for test in comparison.examples:
        rows = [record for record in found if record["test"] == test]
        lines += [
            f"{comparison.task}, {test}, {rows[0]['examples']:,} examples, in %:",
            "",
            f"| {' | '.join(head)} |",
            "|---" * len(head) + "|",
        ]
        for record in rows:
            cells = [record["model"]]
            for metric in shown:
                value, low, high = record["metrics"][metric].values()
                cells.append(
                    f"{value:.1f}" if metric == INVALID else f"{value:.1f} [{low:.1f}, {high:.1f}]"
                )
            seeds = zip(record["per_seed"], record["diverged"], strict=True)
            cells.append(", ".join(f"{score:.1f}{DIVERGED * lost}" for score, lost in seeds))
            gap = record.get("difference")
            if gap is None:
                cells += ["", ""]
            else:
                cells.append(f"{gap['value']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}]")
                spread = gap["seeds"]
                cells.append(f"[{spread[0]:+.1f}, {spread[1]:+.1f}]" if spread else "")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines.append(
        "Intervals: 95 %, bootstrap over test examples of the mean over seeds, differences paired; "
        "`seeds`: Welch's over the seeds' scores."
    )
    if first in MEASURES:
        lines.append(f"ROUGE: rouge-score, stemmed, F; {SPLITTER}.")
    return "\n".join(lines)
