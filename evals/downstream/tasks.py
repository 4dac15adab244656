"""A task: where its rows are, how a row becomes a text and the text that is wanted for it.

A file of configs/task/ describes one:

    train, validation: places (data/sources.py); no validation: see `Task.read`
    tests: places by name; `{source}` in a place is the folder given as source=
    input, target: templates, `{column}`; a list of strings has one line each, and as a target
        several references, of which the first is trained on
    labels: the text of each value of the target's column, where that is no text
    metrics: names of evals/downstream/metrics.py; the first one picks weights
"""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.records import Record, read_records
from evals.downstream.examples import Example
from evals.downstream.metrics import METRICS
from pretrain.config import CONFIG_DIR

TASK_DIR = CONFIG_DIR / "task"
FROM_FILES = "jsonl"
COLUMN = re.compile(r"{(\w+)}")


@dataclass(frozen=True)
class Splits:
    """The examples of a task."""

    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]

    def named(self) -> dict[str, list[Example]]:
        """All of them by name; `Task.check` keeps tests from the names of the other two."""
        return {"train": self.train, "validation": self.validation, **self.tests}


@dataclass(frozen=True)
class Task:
    """See the module.

    Attributes:
        holdout: share of the training examples that are for validation where it has no place.
    """

    name: str
    train: Any = ""
    validation: Any = ""
    tests: dict[str, Any] = field(default_factory=dict)
    input: str = ""
    target: str = ""
    labels: dict[Any, str] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)
    holdout: float = 0.1

    @property
    def kind(self) -> str:
        """What its metrics measure: classification, regression or generation."""
        return METRICS[self.metrics[0]].kind

    def check(self) -> None:
        """Raises:
        ValueError: with everything that is missing or wrong.
        """
        problems = []
        for key in ("train", "tests", "input", "target"):
            if not getattr(self, key):
                word = {"tests": "test"}.get(key, key)
                problems.append(f"{word}= is missing")
        for name in {"train", "validation"} & self.tests.keys():
            problems.append(f"tests={name} is the name of another split; choose another")
        places = [("train", self.train), ("validation", self.validation), *self.tests.items()]
        for key, place in places:
            parts = place if isinstance(place, list) else [place]
            if not all(isinstance(part, str) for part in parts):
                problems.append(f"{key}={place} is no place; use a text or a list of texts")
        for key in ("input", "target"):
            template = getattr(self, key)
            if template and not COLUMN.search(template):
                problems.append(f"{key}={template} names no column; use {key}='{{COLUMN}}'")
        if self.labels and self.target and not COLUMN.fullmatch(self.target):
            problems.append(f"target={self.target} must be one column, '{{COLUMN}}', for labels")
        if not self.metrics:
            problems.append(f"metrics= is missing; choose from {', '.join(METRICS)}")
        for name in self.metrics:
            if name not in METRICS:
                problems.append(f"metrics={name} is not known; choose from {', '.join(METRICS)}")
        kinds = {METRICS[name].kind for name in self.metrics if name in METRICS}
        if len(kinds) > 1:
            problems.append(f"metrics={','.join(self.metrics)} measure {' and '.join(kinds)}")
        if not 0 < self.holdout < 1:
            problems.append(f"holdout={self.holdout:g} must lie between 0 and 1")
        if problems:
            raise ValueError(f"task={self.name}: {'; '.join(problems)}")

    def read(self, patience: float = 300.0) -> Splits:
        """Reads all examples.

        Without a place for validation, the training examples whose `rank` is below `holdout` are
        held out: by their content, so the same ones every time, and no duplicate is on both sides.

        Args:
            patience: seconds to wait for a hub that is away.

        Raises:
            ValueError: a row lacks a column, has an unknown label or no text that can be encoded,
                or a split is empty.
        """
        train = list(self._examples("train", self.train, patience))
        if self.validation:
            validation = list(self._examples("validation", self.validation, patience))
        else:
            validation = [example for example in train if example.rank() < self.holdout]
            train = [example for example in train if example.rank() >= self.holdout]
        tests = {
            name: list(self._examples(name, place, patience)) for name, place in self.tests.items()
        }
        for name, place, examples in [
            ("train", self.train, train),
            ("validation", self.validation or f"holdout={self.holdout:g} of train", validation),
            *((name, self.tests[name], examples) for name, examples in tests.items()),
        ]:
            if not examples:
                raise ValueError(
                    f"task={self.name}: the {name} split ({place}) has no example; give a file "
                    f"with rows" + ("" if self.validation else ", or another holdout=")
                )
        return Splits(train, validation, tests)

    def _examples(self, split: str, place: Any, patience: float) -> Iterator[Example]:
        for record in read_records(place, patience):
            example = Example(
                record.where, "\n".join(self._fill(self.input, record, "input")), self._goal(record)
            )
            try:
                "".join([example.input, *example.references]).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise ValueError(
                    f"task={self.name}: {record.where} has {half!r}, half of a surrogate pair, "
                    f"which no encoding accepts; mend the row"
                ) from None
            yield example

    def _goal(self, record: Record) -> tuple[str, ...]:
        if not self.labels:
            return tuple(self._fill(self.target, record, "target"))
        (column,) = COLUMN.findall(self.target)
        value = self._value(column, record, "target")
        if value not in self.labels:
            known = ", ".join(map(str, self.labels))
            raise ValueError(
                f"task={self.name}: {record.where} has {column}={value!r}, which is not one of its "
                f"labels ({known}); choose a split with labels, or mend the task's labels"
            )
        return (self.labels[value],)

    def _fill(self, template: str, record: Record, key: str) -> list[str]:
        """The template's text; if it is one column with a list, the texts in that."""
        whole = COLUMN.fullmatch(template)
        if whole and isinstance(values := self._value(whole[1], record, key), list):
            if not values or not all(isinstance(value, str) for value in values):
                raise ValueError(
                    f"task={self.name}: {record.where} has {whole[1]}={str(values)[:60]}, a list "
                    f"without texts; name another {key}_field= or mend the row"
                )
            return values

        def text(match: re.Match[str]) -> str:
            value = self._value(match[1], record, key)
            return "\n".join(value) if isinstance(value, list) else str(value)

        return [COLUMN.sub(text, template)]

    def _value(self, column: str, record: Record, key: str) -> Any:
        value = record.values.get(column)
        if value is None:
            raise ValueError(
                f"task={self.name}: {record.where} has no field {column!r}; it has "
                f"{', '.join(map(str, record.values))}: set {key}_field="
            )
        return value


def open_task(
    name: str, *, source: str = "", overrides: dict[str, Any] | None = None, folder: Path = TASK_DIR
) -> Task:
    """The task of that name, or for `jsonl` one that the overrides describe.

    Args:
        name: of a file in `folder`, or `jsonl`.
        source: what `{source}` stands for in the task's places.
        overrides: values that win over the file's.
        folder: of the files.

    Raises:
        ValueError: there is no such task (with the closest match), or it is not complete.
    """
    names = sorted([FROM_FILES, *(path.stem for path in folder.glob("*.yaml"))])
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(names)}"
        raise ValueError(f"task={name} is not known; {hint}")
    task = Task(name) if name == FROM_FILES else _load(name, folder / f"{name}.yaml")
    task = replace(task, **(overrides or {}))
    if "{source}" in str([task.train, task.validation, task.tests]) and not source:
        raise ValueError(
            f"task={name}: source= is missing: the folder that holds "
            f"{str(task.train).removeprefix('{source}/')} (the task's file says where it is from)"
        )
    task.check()
    return replace(
        task,
        train=_placed(task.train, source),
        validation=_placed(task.validation, source),
        tests=_placed(task.tests, source),
    )


def _load(name: str, path: Path) -> Task:
    """What a task's file says, each value of the type that `Task` states."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # a YAML syntax error, whatever the parser calls it
        reason = " ".join(str(error).split())
        raise ValueError(f"task={name}: {path} is not valid YAML ({reason}); mend it") from None
    if not isinstance(content, dict):
        raise ValueError(f"task={name}: {path} must be a mapping of keys to values")
    schema = OmegaConf.structured(Task(name))
    OmegaConf.set_readonly(schema, False)  # which it is as a frozen dataclass
    known = [item.name for item in fields(Task) if item.name != "name"]
    problems = []
    for key, value in content.items():
        if key not in known:
            problems.append(f"{key!r} is in no task; use {', '.join(known)}")
            continue
        try:
            OmegaConf.update(schema, key, value, merge=False)
        except OmegaConfBaseException as error:
            problems.append(f"{key}={value}: {str(error).splitlines()[0]}")
    if problems:
        raise ValueError(f"task={name}: {path}: {'; '.join(problems)}")
    return cast(Task, OmegaConf.to_object(schema))


def _placed(place: Any, source: str) -> Any:
    if isinstance(place, dict):
        return {name: _placed(part, source) for name, part in place.items()}
    if isinstance(place, list):
        return [_placed(part, source) for part in place]
    return place.replace("{source}", source)
