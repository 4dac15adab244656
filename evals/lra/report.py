"""From trainings to the table.

Per model and seed the training with the best validation accuracy counts. All seeds are tested on
the same examples, so their answers are not pooled: the interval is Wilson's for one such test set
at the seeds' mean, and the spread of training is in the seeds, which are all listed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.lra.rows import ROWS
from evals.stats import wilson
from evals.trainings import Result, best

BASELINE = "swa"


def summarise(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One record per model, in the order of `ROWS`."""
    records = []
    for row in ROWS:
        seeds = sorted({r["settings"]["seed"] for r in results if r["settings"]["row"] == row})
        if not seeds:
            continue
        chosen = [best(results, row, seed) for seed in seeds]
        accuracy = [result["test"] for result in chosen]
        n = chosen[0]["test_examples"]
        mean = float(np.mean(accuracy))
        records.append(
            {
                "model": row,
                "accuracy": mean,
                "ci95": list(wilson(mean * n, n)),
                "per_seed": accuracy,
                "validation": [result["validation"] for result in chosen],
                "seeds": seeds,
                "learning_rates": [result["settings"]["learning_rate"] for result in chosen],
                "steps": [result["step"] for result in chosen],
                "test_examples": n,
                "parameters": chosen[0]["parameters"],
                "seconds": [result["seconds"] for result in chosen],
                "seconds_per_step": [result["seconds_per_step"] for result in chosen],
            }
        )
    window = [record["accuracy"] for record in records if record["model"] == BASELINE]
    for record in records:
        record["over_window"] = record["accuracy"] - window[0] if window else None
    return records


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The table; accuracies in %, `over swa` in points."""
    lines = [
        f"| model | test accuracy | 95 % interval | each seed | validation | over {BASELINE} "
        "| learning rate | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        over = record["over_window"]
        cells = [
            f"`{record['model']}`",
            _percent(record["accuracy"]),
            " to ".join(map(_percent, record["ci95"])),
            ", ".join(map(_percent, record["per_seed"])),
            ", ".join(map(_percent, record["validation"])),
            "" if over is None else f"{100 * over:+.1f}",
            ", ".join(f"{rate:g}" for rate in record["learning_rates"]),
            f"{record['parameters']:,}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
