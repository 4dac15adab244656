"""What the command's words change in its training, its validation and its answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.tokenizer import BOS_ID, BytesTokenizer
from evals.downstream import outputs
from evals.downstream.examples import Example
from launch import finetune
from pretrain.config import load_config
from pretrain.finetuning.generation import GenerationOptions, generate
from pretrain.finetuning.prompted import prompted
from pretrain.models import LanguageModel
from tests.launch.last_letter import MODEL, WORDS, write, write_examples

# An EOS is likely enough that beams of several lengths compete.
FLAT = MODEL.replace("init_std: 0.3", "init_std: 0.15")

# One step of hardly any size: answers are those of the weights of seed 0.
STILL = {"steps": "1", "learning_rate": "1e-12"}
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    (folder / "tiny.yaml").write_text(FLAT)
    write_examples(folder)
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def run(out: str, **changes: str) -> tuple[list[str], dict[str, Any]]:
    """Answers and result of a command whose folder is `out`."""
    words = {**WORDS, "model": "tiny.yaml", "out": out, **changes}
    assert finetune.main([f"{key}={value}" for key, value in words.items()]) == 0
    folder = Path(out) / "seed_0"
    result = json.loads((folder / "result.json").read_text())
    return outputs.read(folder / "test.jsonl")[0], result


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(f"{split}.jsonl").read_text().splitlines()]


def answers_of(out: str, options: GenerationOptions, max_input: int | None = None) -> list[str]:
    """What the weights that a command left answer to the tests."""
    config = load_config(["model=tiny.yaml"]).model
    tokenizer = BytesTokenizer()
    config.vocab_size = tokenizer.vocab_size
    model = LanguageModel(config)
    model.load_state_dict(torch.load(Path(out) / "seed_0/best.pt", weights_only=True))
    inputs = [tokenizer.encode(row["text"])[:max_input] for row in rows("test")]
    written = generate(prompted(model, start_id=BOS_ID), inputs, options)
    return [tokenizer.decode(ids) for ids in written]


def looks(result: dict[str, Any]) -> list[int]:
    return [check["step"] for check in result["history"]]


def test_tests_are_answered_as_the_words_say() -> None:
    found = []
    for out, options in {
        "greedy": {},
        "beams": {"beams": 4},
        "short": {"beams": 4, "length_penalty": 0},
        "varied": {"no_repeat_ngram_size": 1},
    }.items():
        words = {key: str(value) for key, value in options.items()}
        answers, _ = run(out, max_target_tokens="6", **words, **STILL)
        assert answers == answers_of(out, GenerationOptions(7, **options))
        found.append(tuple(answers))
    assert len(set(found)) == len(found), "every word changes some answer"


def test_validation_is_greedy_whatever_the_tests_are() -> None:
    words = {**STILL, "max_target_tokens": "6"}
    answers, _ = run("its_own", **words)
    asked = [row["text"] for row in rows("test")]
    labelled = zip(asked, answers, strict=True)
    write(Path("greedy.jsonl"), [{"text": text, "label": label} for text, label in labelled])
    found, result = run("searched", validation="greedy.jsonl", beams="4", **words)
    assert found != answers
    assert result["validation"] == 100


def test_training_ends_after_as_many_looks_without_a_better_one_as_patience_says() -> None:
    for patience in (1, 2):
        words = {**STILL, "steps": "6", "check_every": "1", "patience": str(patience)}
        _, result = run(f"patience_{patience}", **words)
        assert looks(result) == list(range(1, 2 + patience))
        assert {check["validation"] for check in result["history"]} == {0.0}
        assert (result["step"], result["steps"]) == (1, 1 + patience), "the first of equals is kept"


def test_epochs_are_the_steps_in_place_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Five batches of 16 are in 90 examples; validation is looked at after each epoch."""
    _, result = run("epochs", epochs="1.4", steps="0", check_every="0")
    assert looks(result) == [5, 7]
    words = {**WORDS, "model": "tiny.yaml", "out": "none", "steps": "0", "epochs": "0.05"}
    told = finetune.main([f"{key}={value}" for key, value in words.items()])
    assert told == finetune.BAD_INPUT
    assert "epochs=0.05 are less than a step; raise them" in capsys.readouterr().err


def test_truncation_cuts_the_ends_off_and_its_share_is_kept_by_split(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"max_input_tokens": "3", "max_target_tokens": "6", "truncate": "true"}
    answers, result = run("cut", **words, **STILL)
    long = {split: [len(row["text"]) > 3 for row in rows(split)] for split in SPLITS}
    shares = {split: sum(some) / len(some) for split, some in long.items()}
    assert result["truncated"] == pytest.approx(shares)
    assert len({*shares.values(), 0.0, 1.0}) == 5, "no two are the same, none is all or nothing"
    assert f"3 at most ({shares['train']:.1%} truncated)" in capsys.readouterr().out
    assert answers == answers_of("cut", GenerationOptions(7), max_input=3)
    assert answers != answers_of("cut", GenerationOptions(7))


def test_fewer_validation_examples_score_as_a_file_of_them_does() -> None:
    def rank(row: dict[str, str]) -> float:
        return Example("", row["text"], (row["label"],)).rank()

    write(Path("seven.jsonl"), sorted(rows("validation"), key=rank)[:7])
    words = {**STILL, "head": "classifier"}  # which always answers a label
    _, of_all = run("all", **words)
    _, some = run("some", validation_examples="7", **words)
    assert some["history"] == run("seven", validation="seven.jsonl", **words)[1]["history"]
    assert some["validation"] != of_all["validation"]
