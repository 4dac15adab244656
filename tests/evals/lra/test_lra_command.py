"""The command end to end on two small trainings; what is done is not done again."""

import json
from dataclasses import replace

import pytest

from evals.lra import __main__ as command
from evals.lra import jobs, report
from evals.lra.listops import ListOps
from evals.lra.rows import ROWS
from evals.trainings import search

TINY = replace(
    command.TASKS["listops"],
    examples=ListOps(max_depth=3, max_args=3, min_length=3, max_length=16),
    sizes=(40, 8, 8),
    steps=2,
    batch_size=4,
)


def result(row, seed, rate, validation, test):
    return {
        "settings": {"row": row, "seed": seed, "learning_rate": rate},
        "validation": validation,
        "test": test,
        "test_examples": 2000,
        "step": 10,
        "parameters": 1234,
        "seconds": 1.0,
        "seconds_per_step": 0.1,
    }


def test_the_best_on_validation_counts_and_is_set_against_the_window():
    results = [
        result("s4d", 0, 1e-3, 0.50, 0.48),
        result("s4d", 0, 3e-3, 0.49, 0.55),
        result("s4d", 1, 3e-3, 0.52, 0.52),
        result("swa", 0, 1e-3, 0.40, 0.38),
        result("swa", 1, 1e-3, 0.40, 0.36),
    ]
    swa, s4d = report.summarise(results)
    assert (swa["model"], s4d["model"]) == ("swa", "s4d")
    assert s4d["per_seed"] == [0.48, 0.52]
    assert s4d["learning_rates"] == [1e-3, 3e-3]
    assert s4d["over_window"] == pytest.approx(0.13)
    lines = report.markdown([swa, s4d]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3] == (
        "| `s4d` | 50.0 | 47.8 to 52.2 | 48.0, 52.0 | 50.0, 52.0 | +13.0 | 0.001, 0.003 | 1,234 |"
    )


def test_command_writes_the_table_it_prints_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    for module in (command, jobs):
        monkeypatch.setitem(module.TASKS, "listops", TINY)
    # In this process, where the small task is known.
    monkeypatch.setattr(
        command,
        "run_all",
        lambda experiment, out, workers: [
            one
            for row in experiment.rows
            for seed in experiment.seeds
            for one in command_search(experiment, row, seed, out)
        ],
    )
    words = [f"out={tmp_path}", "mixers=spade,swa", "seeds=1", "device=cpu", "learning_rates=1e-3"]
    assert command.main(words) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text()
    assert [line.split("`")[1] for line in printed.splitlines()[2:]] == ["swa", "spade"]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert set(saved["provenance"]["data"]) == {"train", "validation", "test"}
    names = sorted(path.name for path in (tmp_path / "trainings").iterdir())
    assert names == ["spade-seed0-lr0.001.json", "swa-seed0-lr0.001.json"]
    monkeypatch.setattr(jobs, "run", None)  # not called again
    assert command.main(words) == 0
    assert capsys.readouterr().out == printed
    assert command.main([*words, "steps=3"]) == 2
    assert "was trained with other settings (options=" in capsys.readouterr().err


def command_search(experiment, row, seed, out):
    out.mkdir(exist_ok=True)
    return search(experiment, row, seed, out)


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("task=listop", "task=listop is not known; use one of listops, text"),
        ("mixers=swa,s4dd", "did you mean s4d?"),
        ("mixers=bst", "'bst' is not known"),
        ("seeds=0", "seeds=0 must be at least 1"),
        ("compile=yes", "compile=yes is not known; use auto, true or false"),
        ("learning_rates=fast", "learning_rates=fast is no list of positive numbers"),
        ("task=text", "source= is missing: the folder of the published Text files"),
        ("out=", "out= is missing"),
    ],
)
def test_a_bad_word_gives_one_clear_error(word, reason, tmp_path, capsys):
    assert command.main([f"out={tmp_path}/new", word]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_default_rows_are_all_rows():
    assert command.LRAArguments().mixers.split(",") == list(ROWS)
