"""Trainings that differ in nothing but the seed, as one: the mean over seeds, and their spread.

The mean is of losses, token by token, so that it is paired with another model as a single run is;
its interval over documents says nothing about seeds. The spread between seeds is a second source of
error that no number of documents shrinks, and is stated apart: as a standard deviation of each row,
and as an interval of each difference.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evals.compare import EvalRun, incomparable, shared_passes
from evals.perplexity.metrics import derive
from evals.scoring.store import TokenTable
from pretrain.config import RunConfig, differences

IN_NAME = r"_?seed_?\d+"
# What a training may differ in and still be of the same recipe: where it lies, what it writes.
NOT_OF_THE_RECIPE = (
    *("name", "out_dir", "seed", "dry_run"),
    *("logging", "checkpoint", "resume", "profile", "eval"),
)


def recipe_sha256(config: RunConfig) -> str:
    """Identity of a training but for its seed; a key that is added later changes no older one's."""
    recipe = {
        key: value
        for key, (_, value) in differences(config).items()
        if key.partition(".")[0] not in NOT_OF_THE_RECIPE
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def group(runs: Sequence[EvalRun], allow: Sequence[str] = ()) -> list[EvalRun]:
    """Puts a mean in the place of the runs of one recipe and several seeds, the first one's place.

    Runs without a recipe (models from elsewhere), and those of one recipe and one seed, stay alone.
    `allow`: names of `evals.compare.ALLOWANCES`.

    Raises:
        ValueError: seeds that were evaluated in ways that do not compare.
    """
    rows: dict[tuple[object, ...], list[EvalRun]] = {}
    for k, run in enumerate(runs):
        model = run.result["model"]
        recipe = model.get("recipe_sha256")
        steps = (model.get("trained_steps"), model.get("precision"))
        rows.setdefault((recipe, *steps) if recipe else (k,), []).append(run)
    grouped = []
    for row in rows.values():
        seeds = {run.result["model"].get("seed") for run in row}
        grouped += [mean(row, allow)] if len(row) > 1 and len(seeds) == len(row) else row
    return grouped


def mean(seeds: Sequence[EvalRun], allow: Sequence[str] = ()) -> EvalRun:
    """The mean over seeds, as a run with the metrics of the mean losses.

    Raises:
        ValueError: they were evaluated in ways that do not compare.
    """
    first = seeds[0]
    for other in seeds[1:]:
        if reasons := incomparable(first, other, allow):
            raise ValueError(
                f"{first.name} and {other.name}, seeds of one recipe, are not comparable: "
                + "; ".join(reasons)
            )
    names = [name for name in first.tables if all(name in shared_passes(first, s) for s in seeds)]
    tables = {name: _mean_table([seed.tables[name] for seed in seeds]) for name in names}
    result = {
        **first.result,
        "name": re.sub(IN_NAME, "", first.name),
        "protocols": [r for r in first.result["protocols"] if r["pass"] in tables],
        "metrics": derive(list(tables.values()), first.result["model"]["train_length"]),
    }
    return EvalRun(result["name"], result, tables, tuple(seeds))


def _mean_table(tables: Sequence[TokenTable]) -> TokenTable:
    first = tables[0]
    nll = np.stack([table.nll for table in tables]).mean(0, dtype=np.float64).astype(np.float32)
    return replace(first, nll=nll)
