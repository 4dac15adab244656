"""The comparing command end to end on tiny models, and one clear error for each bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from data.prepare import PrepareConfig, prepare
from data.shards import Corpus
from evals import subject
from launch import compare, evaluate
from pretrain.config import RunConfig
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig

SENTENCES = ["the cat sat on the mat. ", "a dog ran off. ", "every good book is long, "]
SEEDS = {"narrow_seed0": 0, "narrow_seed1": 1, "wide": 0}


def config_of(name, corpus, out_dir):
    config = RunConfig(name=name, out_dir=str(out_dir), seed=SEEDS[name])
    config.data.path = str(corpus)
    config.train.seq_len = 32
    config.model = LanguageModelConfig(
        vocab_size=384,
        d_model=16,
        n_layers=1,
        layers=LayersConfig(pattern=["swa"]),
        mixers={"swa": {"n_heads": 2, "window_size": 32 if name == "wide" else 16}},
    )
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Evaluated runs whose checkpoints are fresh models; checkpoints have tests of their own."""
    folder = tmp_path_factory.mktemp("runs")
    for split, n_docs in (("train", 3), ("validation", 4)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for k in range(n_docs):
                text = "".join(SENTENCES[(k + i * i) % 3] for i in range(20 + k))
                file.write(json.dumps({"text": text}) + "\n")
    splits = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    corpus = folder / "corpus"
    prepare(PrepareConfig(out=str(corpus), splits=splits, tokenizer="bytes"))
    tokenizer = Corpus.open(corpus).tokenizer.sha256

    def load_model(run_dir, tag):
        config = config_of(run_dir.name, corpus, folder)
        torch.manual_seed(config.seed)
        info = {
            "path": "step_1",
            "passed_over": [],
            "tokenizer": tokenizer,
            "step": 1,
            "tokens": 32,
        }
        return LanguageModel(config.model), config, info

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "load_model", load_model)
        for name in SEEDS:
            (folder / name).mkdir()
            words = ["contexts=16,64", "protocols=fixed,stream", "spans_per_document=2"]
            assert evaluate.main([f"run={folder / name}", *words]) == 0
    return {name: str(folder / name) for name in SEEDS}


def test_table_findings_and_page_of_rows_and_the_ngram(runs, tmp_path, capsys):
    words = [*runs.values(), f"out={tmp_path}", "ngram=true", "baseline=wide"]
    assert compare.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[-1] == "verdict"
    assert lines[0].index("wide bpb") < lines[0].index("narrow bpb"), "the baseline stands first"
    assert [line.split()[:2] for line in lines[1:3]] == [["fixed(4)", "16"], ["fixed(4)", "64"]]
    assert "±" in lines[1], "the spread between seeds"
    assert "byte 5-gram better than wide" in lines[1]
    assert any(line.startswith("wide against narrow, by context: ") for line in lines)
    assert not any(line.startswith("narrow against") for line in lines)
    assert lines[-1] == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Runs</h2>" in page, "what the runs are stands above the numbers"
    for words in ("byte 5-gram", "narrow_seed1", "0, 1", "simultaneous 95 %"):
        assert words in page
    assert "| pair |" in (tmp_path / "report.md").read_text()


def test_without_a_folder_nothing_is_written(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare.main(list(runs.values())) == 0
    assert "narrow against wide" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_two_evaluations_of_one_training_compare_by_their_paths(runs, tmp_path, capsys):
    first = Path(runs["wide"]) / "eval" / "perplexity"
    second = shutil.copytree(first, tmp_path / "later")
    assert compare.main([str(first), str(second), f"baseline={second}/"]) == 0
    assert f"{second} against {first}, by context: no difference shown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out=x"], "no runs; use compare.py"),
        (["nowhere"], "no result.json"),
        (["WIDE", "ngram=maybe"], "ngram=maybe: use true or false"),
        (["WIDE", "baseline=other"], "baseline=other: no such run; there are: wide"),
        (["WIDE", "allow=gates"], "allow=gates: choose from policy, precision"),
        (["WIDE", "name=lra"], "eval/lra"),
        (["WIDE", "WIDE"], "/wide: each needs a name of its own"),
        (["WIDE", "name=mine"], "contexts=64..8192 name=mine"),
        (["WIDE", "suite=mine"], "the folder below RUN/eval is called by name=, as in evaluate.py"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(runs, words, message, capsys, monkeypatch):
    words = [runs["wide"] if word == "WIDE" else word for word in words]
    assert compare.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
