"""From trainings to the table: JSON, CSV, Markdown, and a figure.

Per model and seed the training with the best validation accuracy counts, the earlier one of equals.
Intervals are Wilson's over all seeds' test documents together; several answers in one document
count as one trial, since they are not independent. They hold for the trained models: the spread of
training itself is in the seeds, which are all listed.
"""

import csv
import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evals.plots import COLOURS, REFERENCE_COLOUR, STYLE
from evals.recall.rows import ROWS, Memory
from evals.stats import wilson
from evals.trainings import Result, best

BAR = 0.95

_COLOURS = dict(zip(map(str, Memory), COLOURS, strict=False))


def summarise(results: Sequence[Result], chance: float, *, bars: bool) -> list[dict[str, Any]]:
    """One record per model, in the order of `ROWS`.

    Args:
        results: all trainings.
        chance: accuracy of a guess.
        bars: whether the task has them: a window alone stays at chance, and every seed of a
            constant state reaches `BAR`, read whole and streamed; `shown` says whether that holds.
    """
    records = []
    for row, model in ROWS.items():
        trainings = [result for result in results if result["settings"]["row"] == row]
        if not trainings:
            continue
        seeds = sorted({result["settings"]["seed"] for result in trainings})
        chosen = [best(trainings, row, seed) for seed in seeds]
        tests = {test: _pooled(chosen, test) for test in chosen[0]["tests"]}
        accuracy = {test: pooled["per_seed"] for test, pooled in tests.items()}
        interval = tests["whole"]["ci95"]
        shown = None
        if bars and model.memory is Memory.LOCAL:
            shown = interval[0] <= chance <= interval[1]
        elif bars and model.memory is Memory.CONSTANT:
            shown = min(accuracy["whole"] + accuracy["stream"]) >= BAR
        records.append(
            {
                "model": row,
                "memory": str(model.memory),
                "accuracy": tests["whole"]["accuracy"],
                "ci95": interval,
                "tests": tests,
                "seeds": seeds,
                "learning_rates": [result["settings"]["learning_rate"] for result in chosen],
                "steps": [result["steps"] for result in chosen],
                "state_floats": chosen[0]["state_floats"],
                "parameters": chosen[0]["parameters"],
                "shown": shown,
            }
        )
    return records


def bars_line(records: Sequence[dict[str, Any]]) -> str:
    """How many rows keep the bar of their kind of memory, and which do not; "" without bars."""
    judged = [record for record in records if record["shown"] is not None]
    if not judged:
        return ""
    missed = [record["model"] for record in judged if not record["shown"]]
    line = f"{len(judged) - len(missed)} of {len(judged)} rows keep their bar"
    return f"{line}; not: {', '.join(missed)}" if missed else line


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The table of the README; accuracies in %."""
    longer = [test for test in records[0]["tests"] if test not in ("whole", "stream")]
    header = ["model", "memory", "accuracy", "95 % interval", "each seed", "streamed"]
    header += [f"{test} as long" for test in longer] + ["state per layer", "parameters"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for record in records:
        low, high = record["ci95"]
        tests = record["tests"]
        cells = [
            f"`{record['model']}`",
            record["memory"],
            _percent(record["accuracy"]),
            f"{_percent(low)} to {_percent(high)}",
            ", ".join(map(_percent, tests["whole"]["per_seed"])),
            *(_percent(tests[test]["accuracy"]) for test in ("stream", *longer)),
            " + ".join(f"{floats:,}" for floats in record["state_floats"]),
            f"{record['parameters']:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def to_csv(records: Sequence[dict[str, Any]]) -> str:
    """One line per model, seed and test."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = "model memory seed learning_rate steps test tokens documents accuracy ci95_low"
    writer.writerow([*columns.split(), "ci95_high", "state_floats", "parameters"])
    for record in records:
        for k, seed in enumerate(record["seeds"]):
            for name, test in record["tests"].items():
                accuracy, documents = test["per_seed"][k], test["documents_per_seed"]
                writer.writerow(
                    [
                        *(record["model"], record["memory"], seed),
                        *(record["learning_rates"][k], record["steps"][k]),
                        *(name, test["tokens"], documents, accuracy),
                        *wilson(accuracy * documents, documents),
                        *(sum(record["state_floats"]), record["parameters"]),
                    ]
                )
    return text.getvalue()


def figure(records: Sequence[dict[str, Any]], chance: float, title: str) -> Figure:
    """Accuracy by model, over the size of its state, and over the length of the document."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(16, max(4.0, 1.2 + 0.27 * len(records))), layout="constrained")
        by_model, over_state, over_length = drawn.subplots(1, 3)
        _draw_by_model(by_model, records, chance)
        by_model.set_title(title)
        _draw_over_state(over_state, records, chance)
        _draw_over_length(over_length, records, chance)
    return drawn


def _draw_by_model(axis: Axes, records: Sequence[dict[str, Any]], chance: float) -> None:
    labelled = set()
    for y, record in enumerate(records):
        kind, seeds = record["memory"], record["tests"]["whole"]["per_seed"]
        label = None if kind in labelled else kind
        labelled.add(kind)
        axis.plot(record["ci95"], [y, y], color=_COLOURS[kind], linewidth=2)
        axis.plot(seeds, [y] * len(seeds), "o", ms=4, color=_COLOURS[kind], label=label)
    axis.axvline(chance, color=REFERENCE_COLOUR, linestyle=":", label="chance")
    axis.set_yticks(range(len(records)), [record["model"] for record in records])
    axis.invert_yaxis()
    axis.set_xlim(-0.03, 1.03)
    axis.set_xlabel("accuracy: a dot per seed, the 95 % interval of all")
    axis.legend(loc="upper center", fontsize=8)


def _draw_over_state(axis: Axes, records: Sequence[dict[str, Any]], chance: float) -> None:
    for record in records:
        place = (sum(record["state_floats"]), record["accuracy"])
        axis.plot(*place, "o", ms=5, color=_COLOURS[record["memory"]])
        axis.annotate(record["model"], place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axis.axhline(chance, color=REFERENCE_COLOUR, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.03, 1.08)
    axis.set_xlabel("state of all layers (numbers, at the trained length)")
    axis.set_ylabel("accuracy, mean of seeds")
    axis.set_title("Accuracy over state size")


def _draw_over_length(axis: Axes, records: Sequence[dict[str, Any]], chance: float) -> None:
    """Shaded: the 95 % interval of all seeds' documents."""
    for k, record in enumerate(records):
        # Whole, at the trained length; all longer ones are streamed.
        tests = [test for name, test in record["tests"].items() if name != "stream"]
        lengths, colour = [test["tokens"] for test in tests], matplotlib.colormaps["tab20"](k % 20)
        accuracy = [test["accuracy"] for test in tests]
        axis.plot(lengths, accuracy, "o-", ms=3, lw=1.3, color=colour, label=record["model"])
        low, high = zip(*(test["ci95"] for test in tests), strict=True)
        axis.fill_between(lengths, low, high, color=colour, alpha=0.13, linewidth=0)
    axis.axhline(chance, color=REFERENCE_COLOUR, linestyle=":")
    trained = records[0]["tests"]["whole"]["tokens"]
    axis.axvline(trained, color="#111827", linestyle=":", linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.set_xlabel("document (tokens); dotted: trained length, chance")
    axis.set_ylim(-0.03, 1.08)
    axis.set_title("Accuracy over length, trained short")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)


def _pooled(chosen: Sequence[Result], test: str) -> dict[str, Any]:
    """A test's counts over the seeds' trainings."""
    counts = [result["tests"][test] for result in chosen]
    per_seed = [count["correct"] / count["answers"] for count in counts]
    accuracy = float(np.mean(per_seed))
    documents = sum(count["documents"] for count in counts)
    return {
        "accuracy": accuracy,
        "ci95": list(wilson(accuracy * documents, documents)),
        "per_seed": per_seed,
        "tokens": counts[0]["tokens"],
        "documents": documents,
        "documents_per_seed": counts[0]["documents"],
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
