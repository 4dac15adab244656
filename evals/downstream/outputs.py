"""What models wrote, kept beside what was wanted: every score can be made anew without a model.

OUT/settings.json                 the task, the model, the options, a digest of each split
OUT/baselines/NAME/TEST.jsonl     id, prediction, references
OUT/seed_N/TEST.jsonl             likewise
OUT/seed_N/result.json            written last; a seed that has it is done
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.downstream.examples import Example
from pretrain.files import replace_text

SETTINGS, RESULT = "settings.json", "result.json"


@dataclass(frozen=True)
class Outputs:
    """Answers of one model to the tests of a task.

    Attributes:
        name: of the row in tables.
        tests: by name of test, per seed, per example.
        diverged: per seed, whether its training ended at a loss that is no number.
    """

    name: str
    tests: dict[str, list[list[str]]]
    diverged: list[bool]


def write(folder: Path, test: str, predictions: Sequence[str], examples: Sequence[Example]) -> None:
    """Writes a file of answers, whole or not at all."""
    lines = [
        json.dumps({"id": e.id, "prediction": text, "references": e.references})
        for text, e in zip(predictions, examples, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"{test}.jsonl", "\n".join(lines) + "\n")


def read(path: Path) -> tuple[list[str], list[Example]]:
    """The answers in a file and, without their inputs, the examples.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        examples = [Example(row["id"], "", tuple(row["references"])) for row in rows]
        return [row["prediction"] for row in rows], examples
    except (ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: damaged ({error}); delete {path.parent} and run its command again")


def _has_diverged(seed: Path) -> bool:
    path = seed / RESULT
    try:
        return json.loads(path.read_text(encoding="utf-8"))["diverged"]
    except (ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def read_settings(out: Path) -> dict[str, Any]:
    """What launch/finetune.py was asked for.

    Raises:
        ValueError: the folder is none of its, or the file is damaged.
    """
    path = out / SETTINGS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{out}: no {SETTINGS} in it; name an out= of finetune.py") from error
    except ValueError as error:
        raise ValueError(
            f"{path}: damaged ({error}); restore it, or choose another out="
        ) from error


def collect(out: Path) -> tuple[list[Outputs], Outputs, dict[str, list[Example]]]:
    """The baselines, the model's outputs over its finished seeds, and the examples of each test.

    Raises:
        ValueError: no seed is finished, or two are of other test examples.
    """
    seeds = sorted(path.parent for path in out.glob(f"seed_*/{RESULT}"))
    if not seeds:
        raise ValueError(f"{out}: no seed is finished; run its command again")
    settings = read_settings(out)
    names = settings["task"]["tests"]
    examples = {test: read(seeds[0] / f"{test}.jsonl")[1] for test in names}

    def answers(folder: Path, test: str) -> list[str]:
        texts, theirs = read(folder / f"{test}.jsonl")
        if theirs != examples[test]:
            raise ValueError(
                f"{folder}: its {test} examples are not those of {seeds[0]}; delete one of the two "
                f"folders and run its command again"
            )
        return texts

    baselines = [
        Outputs(folder.name, {test: [answers(folder, test)] for test in names}, [False])
        for folder in sorted(out.glob("baselines/*"))
    ]
    tests = {test: [answers(seed, test) for seed in seeds] for test in names}
    diverged = [_has_diverged(seed) for seed in seeds]
    head = settings["arguments"].get("head", "text")
    name = out.name if head == "text" else f"{out.name} (head: {head})"
    return baselines, Outputs(name, tests, diverged), examples
