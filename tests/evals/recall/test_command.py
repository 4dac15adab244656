"""The command end to end on two small trainings; what is done is not done again."""

import csv
import json
import os

import pytest

from data.folder_lock import lock_folder
from evals import trainings
from evals.recall import __main__ as command
from evals.recall import jobs, report
from evals.recall.jobs import Experiment
from evals.recall.tasks import FlagRecall
from evals.recall.train import TrainOptions

TASK = FlagRecall(seq_len=8, min_distance=4)
OPTIONS = TrainOptions(
    steps=2,
    check_every=2,
    validation_examples=4,
    test_examples=4,
    batch_size=2,
    test_lengths=(2, 4),
)


def experiment(**changes):
    values = {
        "task": TASK,
        "rows": ("swa",),
        "seeds": (0,),
        "learning_rates": (1e-2, 1e-3),
        "options": OPTIONS,
        "device": "cpu",
    }
    return Experiment(**(values | changes))


def fake_run(validation):
    """Stands in for training: reaches the accuracy that is given for a learning rate."""

    def run(config, task, learning_rate, seed, options, device):
        accuracy = validation[learning_rate]
        correct = {"correct": round(1000 * accuracy), "answers": 1000, "documents": 1000}
        tests = {
            test: correct | {"tokens": tokens}
            for test, tokens in (("whole", 8), ("stream", 8), ("2x", 16), ("4x", 32))
        }
        return {
            "validation": accuracy,
            "solved": accuracy >= options.solved,
            "steps": 2,
            "tests": tests,
            "state_floats": [64, 32],
            "parameters": 1234,
        }

    return run


def test_learning_rates_are_tried_in_order_until_one_solves(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "run", fake_run({1e-2: 0.5, 3e-3: 1.0, 1e-3: 1.0}))
    rates = (1e-2, 3e-3, 1e-3)
    results = trainings.search(experiment(learning_rates=rates), "swa", 0, tmp_path)
    assert [result["settings"]["learning_rate"] for result in results] == [1e-2, 3e-3]


def test_finished_trainings_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "run", fake_run({1e-2: 0.5, 1e-3: 0.7}))
    first = trainings.search(experiment(), "swa", 0, tmp_path)
    lost = sorted(tmp_path.iterdir())[0]
    lost.unlink()
    trained = []

    def count(config, task, learning_rate, *rest):
        trained.append(learning_rate)
        return fake_run({1e-2: 0.5, 1e-3: 0.7})(config, task, learning_rate, *rest)

    monkeypatch.setattr(jobs, "run", count)
    assert trainings.search(experiment(), "swa", 0, tmp_path) == first
    assert len(trained) == 1
    assert lost.exists()


def test_other_settings_in_the_same_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "run", fake_run({1e-2: 1.0}))
    trainings.search(experiment(), "swa", 0, tmp_path)
    changed = experiment(options=TrainOptions(steps=7))
    with pytest.raises(ValueError, match=r"swa-seed0-lr0.01.json .*options.*use another out="):
        trainings.run_all(changed, tmp_path, workers=1)


def test_workers_are_spread_over_the_gpus_and_end_with_their_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    handed, tied = [], []
    monkeypatch.setattr(trainings, "leave_with_parent", lambda: tied.append(True))

    class Pool:
        def __init__(self, n_workers, context, initializer, arguments):
            for _ in range(n_workers):
                initializer(*arguments)
                handed.append(os.environ["CUDA_VISIBLE_DEVICES"])
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")

        def submit(self, *call):
            raise InterruptedError

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(trainings, "ProcessPoolExecutor", Pool)
    for workers in (2, 8):
        with pytest.raises(InterruptedError):
            trainings.run_all(experiment(seeds=(0, 1, 2)), tmp_path, workers)
    assert handed == ["3", "5", "3", "5", "3"]
    assert len(tied) == 5


def records(accuracy):
    """A summary of three models whose seeds all have the accuracy given."""
    results = []
    for row, value in accuracy.items():
        for seed in range(3):
            result = fake_run({1e-2: value})(None, None, 1e-2, seed, OPTIONS, None)
            result["settings"] = {"row": row, "seed": seed, "learning_rate": 1e-2}
            results.append(result)
    return report.summarise(results, TASK.chance, bars=True)


def test_bars_are_chance_for_windows_and_95_percent_for_constant_states():
    good = records({"s4d": 0.96, "swa": 0.063, "attention": 0.2})
    assert [(record["model"], record["shown"]) for record in good] == [
        ("swa", True),
        ("s4d", True),
        ("attention", None),
    ]
    assert good[0]["tests"]["whole"]["documents"] == 3000
    bad = records({"s4d": 0.94, "swa": 0.10})
    assert [record["shown"] for record in bad] == [False, False]
    assert report.bars_line(good) == "2 of 2 rows keep their bar"
    assert report.bars_line([*good, *bad]) == "2 of 4 rows keep their bar; not: swa, s4d"


def test_the_best_on_validation_counts_not_the_best_on_the_test():
    results = []
    for rate, validation, test in ((1e-2, 0.5, 0.9), (1e-3, 0.6, 0.4)):
        result = fake_run({rate: test})(None, None, rate, 0, OPTIONS, None)
        result |= {"validation": validation}
        result["settings"] = {"row": "swa", "seed": 0, "learning_rate": rate}
        results.append(result)
    (record,) = report.summarise(results, TASK.chance, bars=True)
    assert record["accuracy"] == 0.4
    assert record["learning_rates"] == [1e-3]


def test_markdown_has_a_line_per_model():
    lines = report.markdown(records({"s4d": 0.96, "swa": 0.0625})).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "| streamed | 2x as long | 4x as long | state per layer |" in lines[0]
    assert lines[3].startswith("| `s4d` | constant state | 96.0 | 95.2 to 96.6 | 96.0, 96.0, 96.0")


def test_a_second_command_on_the_same_trainings_is_refused(tmp_path):
    with (
        lock_folder(tmp_path, AssertionError()),
        pytest.raises(ValueError, match="another command is training there"),
    ):
        trainings.run_all(experiment(), tmp_path, 1)


def test_command_writes_the_table_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.PRESETS, "flag", command.Preset(TASK, 2, 2, True))
    monkeypatch.setattr(command, "TrainOptions", lambda **given: OPTIONS)
    words = [f"out={tmp_path}", "mixers=s4d,swa", "seeds=1", "device=cpu", "workers=1"]
    assert command.main([*words, "learning_rates=1e-2"]) == 0
    printed, log = capsys.readouterr()
    assert "\r" not in log, "no bar where there is no terminal"
    table = (tmp_path / "table.md").read_text()
    assert len(table.splitlines()) == 4
    assert printed.startswith(table)
    assert printed.splitlines()[4].endswith("rows keep their bar; not: s4d")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [line["test"] for line in lines] == 2 * ["whole", "stream", "2x", "4x"]
    assert [line["tokens"] for line in lines[:4]] == ["8", "8", "16", "32"]
    assert all(float(x["ci95_low"]) <= float(x["accuracy"]) for x in lines)
    assert {x["model"]: int(x["state_floats"]) for x in lines} == {"s4d": 4096, "swa": 4096}
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [model["model"] for model in saved["models"]] == ["swa", "s4d"]
    assert saved["provenance"]["experiment"]["task"]["min_distance"] == 4
    assert len(list((tmp_path / "trainings").iterdir())) == 2


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("task=flags", "task=flags is not known; use flag, mqar, induction, "),
        ("test_lengths=1,2", "test_lengths=1,2: different multiples"),
        ("test_lengths=2,2", "test_lengths=2,2: different multiples"),
        ("test_lengths=4-8", "test_lengths=4-8: must be whole numbers"),
        ("mixers=swa,s4dd", "did you mean s4d?"),
        ("seeds=0", "seeds=0 must be at least 1"),
        ("workers=0", "workers=0 must be at least 1"),
        ("steps=many", "steps=many: must be a whole number"),
        ("learning_rates=1e-3,x", "learning_rates=1e-3,x is no list of positive numbers"),
        ("learning_rates=-1", "learning_rates=-1 is no list"),
        ("device=abacus", "device=abacus cannot be used"),
        ("lr=3", "lr=3: not known; use KEY=VALUE with task, mixers"),
        ("out=", "out= is missing"),
    ],
)
def test_a_bad_word_gives_one_clear_error(word, reason, tmp_path, capsys):
    assert command.main([f"out={tmp_path}/new", word]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_a_book_that_would_need_more_names_is_refused_before_training(tmp_path, capsys):
    words = [f"out={tmp_path}/new", "task=phonebook", "test_lengths=2,32"]
    assert command.main(words) == 2
    assert "n_entries=512 does not fit" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
