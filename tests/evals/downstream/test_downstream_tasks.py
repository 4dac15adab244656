"""Rows become examples as the task says, and what is missing is named."""

import json
import re

import pytest

from evals.downstream.examples import Example
from evals.downstream.tasks import TASK_DIR, open_task

WORDS = {
    "input": "{text}",
    "target": "{label}",
    "metrics": ["accuracy"],
}


def rows(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """400 training examples, every one twice, and a few others."""
    train = [{"text": f"text {i % 200}", "label": i % 2} for i in range(400)]
    return {
        "train": rows(tmp_path / "train.jsonl", train),
        "validation": rows(tmp_path / "validation.jsonl", train[:5]),
        "tests": {"test": rows(tmp_path / "test.jsonl", train[:7])},
    }


def task(files, **changes):
    return open_task("jsonl", overrides={**WORDS, **files, **changes})


@pytest.mark.parametrize("name", sorted(path.stem for path in TASK_DIR.glob("*.yaml")))
def test_every_task_file_is_complete(name):
    opened = open_task(name, source="some/folder")
    places = str([opened.train, opened.validation, opened.tests])
    assert "{" not in places.replace("{'", "")
    assert opened.train != opened.validation
    assert opened.validation not in opened.tests.values()


def test_templates_take_columns_and_lists_are_lines_or_references(tmp_path):
    row = {"title": "T", "source": ["One.", "Two."], "target": ["short", "brief"], "year": 7}
    path = rows(tmp_path / "a.jsonl", [row])
    opened = open_task(
        "jsonl",
        overrides={
            "train": path,
            "validation": path,
            "tests": {"test": path},
            "input": "{title} ({year}): {source}",
            "target": "{target}",
            "metrics": ["rougeL"],
        },
    )
    (example,) = opened.read().train
    assert example == Example("a.jsonl row 0", "T (7): One.\nTwo.", ("short", "brief"))


def test_labels_become_words_and_others_are_refused(files):
    opened = task(files, labels={0: "no", 1: "yes"})
    assert [example.references for example in opened.read().tests["test"]][:2] == [
        ("no",),
        ("yes",),
    ]
    with pytest.raises(
        ValueError,
        match=r"train.jsonl row 0 has label=0, which is not one of its "
        r"labels \(1, -1\)",
    ):
        task(files, labels={1: "yes", -1: "no"}).read()


def test_the_held_out_share_is_stated_the_same_and_apart(files):
    splits = task(files, validation="", holdout=0.25).read()
    assert splits == task(files, validation="", holdout=0.25).read()
    assert len(splits.train) + len(splits.validation) == 400
    assert 60 < len(splits.validation) < 140
    assert not {e.input for e in splits.train} & {e.input for e in splits.validation}


def test_a_missing_field_is_named_with_those_there_are(files):
    with pytest.raises(
        ValueError,
        match=r"task=jsonl: train.jsonl row 0 has no field 'body'; it "
        r"has text, label: set input_field=",
    ):
        task(files, input="{body}").read()
    with pytest.raises(ValueError, match=r"no field 'goal'.*set target_field="):
        task(files, target="{goal}").read()


def test_an_unknown_task_gets_its_closest_match():
    with pytest.raises(ValueError, match="task=sst-2 is not known; did you mean 'sst2'"):
        open_task("sst-2")
    with pytest.raises(ValueError, match=r"task=zzz is not known; there are: .*jsonl.*sst2"):
        open_task("zzz")


def test_half_a_surrogate_pair_is_named_with_its_row(files, tmp_path):
    path = rows(tmp_path / "half.jsonl", [{"text": text, "label": 1} for text in ("t", "\ud800")])
    with pytest.raises(ValueError, match=r"half.jsonl row 1 has '\\ud800', half of a surrogate"):
        task(files, validation=path).read()


def test_an_empty_split_is_an_error(files, tmp_path):
    empty = rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"the validation split \(.*empty.jsonl\) has no example"):
        task(files, validation=empty).read()
    one = rows(tmp_path / "one.jsonl", [{"text": "t", "label": 1}])
    with pytest.raises(ValueError, match=r"split \(holdout=0.1 of train\) has no example"):
        task(files, train=one, validation="").read()
    with pytest.raises(ValueError, match=r"the test split \(.*\) has no example"):
        task(files, tests={"test": empty}).read()


def test_everything_that_is_missing_is_said_at_once():
    with pytest.raises(
        ValueError,
        match=r"train= is missing; test= is missing; input= is missing; "
        r"target= is missing; metrics= is missing; choose from accuracy",
    ):
        open_task("jsonl")
    with pytest.raises(ValueError, match=r"metrics=blue is not known"):
        open_task("jsonl", overrides={**WORDS, "metrics": ["blue"]})
    with pytest.raises(ValueError, match=r"metrics=accuracy,rougeL measure"):
        open_task("jsonl", overrides={**WORDS, "metrics": ["accuracy", "rougeL"]})
    with pytest.raises(ValueError, match=r"task=banking77: source= is missing"):
        open_task("banking77")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[train, test]", "must be a mapping of keys to values"),
        ("tests: [", "is not valid YAML (while parsing"),
        ("tests: test.jsonl", "tests=test.jsonl: Cannot assign str to Dict[str, Any]"),
        ("tests: {test: 3}", "test=3 is no place; use a text or a list of texts"),
        ("tests: {train: t.jsonl}", "tests=train is the name of another split"),
        ("train: {a: b}", "train={'a': 'b'} is no place"),
        ("input: 3", "input=3 names no column; use input='{COLUMN}'"),
        ("input: [text]", "input=['text']: Cannot convert 'list' to string"),
        ("labels: [a, b]", "labels=['a', 'b']: "),
        ("labels: {0: [a]}", "labels={0: ['a']}: Cannot convert 'list' to string"),
        ("target: '{text} {label}'", "target={text} {label} must be one column, '{COLUMN}', for"),
        ("target: label", "target=label must be one column"),
        ("metrics: accuracy", "metrics=accuracy: Invalid value assigned: str is not a ListConfig"),
        ("holdout: much", "holdout=much: Value 'much' of type 'str' could not be converted"),
        ("validaton: a", "'validaton' is in no task; use train, validation"),
    ],
)
def test_a_malformed_task_file_is_one_line_that_names_the_key(text, told, tmp_path):
    whole = {
        "train": "a.jsonl",
        "validation": "b.jsonl",
        "tests": "{test: c.jsonl}",
        "input": "'{text}'",
        "target": "'{label}'",
        "labels": "{0: a, 1: b}",
        "metrics": "[accuracy]",
    }
    path = tmp_path / "mine.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in whole.items()))
    assert open_task("mine", folder=tmp_path).labels == {0: "a", 1: "b"}
    kept = [f"{key}: {value}" for key, value in whole.items() if not text.startswith(f"{key}:")]
    path.write_text(text if text.startswith("[") else "\n".join([*kept, text]))
    with pytest.raises(ValueError, match=f"^task=mine: .*{re.escape(told)}.*$") as raised:
        open_task("mine", folder=tmp_path)
    assert "\n" not in str(raised.value)
