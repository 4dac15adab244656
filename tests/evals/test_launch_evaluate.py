"""The command line end to end on a tiny corpus, and one clear error for each bad input."""

import json

import pytest
import torch

from data.folder_lock import lock_folder
from data.prepare import PrepareConfig, prepare
from data.shards import Corpus
from data.tokenizer import BOS_ID, EOS_ID
from evals import subject
from evals.scoring.protocols import parse_contexts
from launch import evaluate
from pretrain.config import RunConfig
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig
from pretrain.training.manifest import CheckpointError

SENTENCES = ["the cat sat on the mat. ", "a dog ran off. ", "every good book is long, "]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for split, n_docs in (("train", 3), ("validation", 4)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for k in range(n_docs):
                text = "".join(SENTENCES[(k + i * i) % 3] for i in range(20 + k))
                file.write(json.dumps({"text": text}) + "\n")
    splits = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    prepare(PrepareConfig(out=str(folder / "corpus"), splits=splits, tokenizer="bytes"))
    return folder / "corpus"


@pytest.fixture
def run(tmp_path, corpus, monkeypatch):
    """A run folder whose checkpoint is a fresh model; checkpoints have tests of their own."""
    config = RunConfig(name="tiny", out_dir=str(tmp_path))
    config.data.path = str(corpus)
    config.train.seq_len = 32
    config.model = LanguageModelConfig(
        vocab_size=384,
        d_model=16,
        n_layers=1,
        layers=LayersConfig(pattern=["swa"]),
        mixers={"swa": {"n_heads": 2, "window_size": 16}},
    )

    tokenizer = Corpus.open(corpus).tokenizer.sha256

    def load_model(run_dir, tag):
        torch.manual_seed(0)
        if tag != "latest":
            raise CheckpointError(f"{run_dir}/checkpoints/{tag}: is not there; there are: none")
        info = {
            "path": str(run_dir / "checkpoints" / "step_00000001"),
            "tokenizer": tokenizer,
            "step": 1,
            "tokens": 32,
            "passed_over": [],
        }
        return LanguageModel(config.model), config, info

    monkeypatch.setattr(subject, "load_model", load_model)
    config.run_dir.mkdir()
    return config.run_dir


def test_evaluating_and_rebuilding_print_the_pages_path_last(run, capsys, monkeypatch):
    assert evaluate.main([f"run={run}", "contexts=16..128", "spans_per_document=2"]) == 0
    folder = run / "eval" / "perplexity"
    out, log = capsys.readouterr()
    assert "fixed-4-C00000016: 4 documents, " in log
    assert "\r" not in log, "no bar where there is no terminal"
    lines = out.splitlines()
    assert lines[-1] == str(folder / "report.html")
    assert {p.name for p in folder.iterdir()} >= {
        "result.json",
        "curve.csv",
        "curve.png",
        "report.html",
        "tokens",
    }
    result = json.loads((folder / "result.json").read_text())
    assert [m["context"] for m in result["metrics"] if m["name"] == "bpb"][:4] == [16, 32, 64, 128]
    assert result["tokenizer"]["lossless"]
    assert result["env"]["float32_matmul_precision"] == "highest"
    assert result["command"].startswith("launch/evaluate.py run=")
    assert result["data"]["n_bytes"] + 4 == result["data"]["n_tokens"], "bytes, and EOS four times"

    (folder / "result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(subject, "load_model", None)
        assert evaluate.main(["rebuild", f"run={run}"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert json.loads((folder / "result.json").read_text()) == result


def test_fp32_is_not_tf32_whatever_was_set_before(run, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    subject.open_subject(subject.SubjectArguments(run=str(run), device="cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_windows_slide_by_the_stride_of_the_command_line(run, capsys):
    words = ["contexts=32,128", "protocols=sliding,truncate", "stride_tokens=16"]
    assert evaluate.main([f"run={run}", "limit=2", *words]) == 0
    ids = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:-1]]
    expected = [["sliding(16)", "32"], ["sliding(16)", "128"]]
    assert ids == [*expected, ["truncate(32)", "32"], ["truncate(128)", "128"]]
    page = (run / "eval" / "perplexity" / "report.html").read_text()
    assert "tiny word ppl" in page


def test_extrapolation_says_what_it_found_and_prints_the_pages_path_last(run, capsys):
    words = [f"run={run}", "suite=extrapolation", "min_documents=4", "concat_tokens=1024"]
    assert evaluate.main([*words, "multiples=1/2..4"]) == 0
    folder = run / "eval" / "extrapolation"
    out, log = capsys.readouterr()
    assert "\r" not in log, "no bar where there is no terminal"
    lines = out.splitlines()
    assert lines[0].startswith("flat at 64, 128 tokens, against 32: ")
    assert lines[-1] == str(folder / "report.html")
    before = (folder / "result.json").read_text()
    assert evaluate.main(["rebuild", f"run={run}", "suite=extrapolation"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert (folder / "result.json").read_text() == before


def test_recall_asks_a_run_and_prints_the_pages_path_last(run, capsys):
    words = ["suite=recall", "lengths=64,300", "depths=0,1", "trials=4", "candidates=3"]
    assert evaluate.main([f"run={run}", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(run / "eval" / "recall" / "report.html")
    assert lines[0].startswith("passkey at 300 tokens: ")
    assert lines[0].endswith(", chance 33.3 %")
    assert any(line.startswith("passkey at 64 tokens: not asked") for line in lines)
    result = json.loads((run / "eval" / "recall" / "result.json").read_text())
    assert result["model"]["train_length"] == 32
    assert result["questions"]["lengths"] == [64, 300]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "suite=recall", "depths=0,half"], "depths=0,half is no list of shares"),
        (["RUN", "suite=recall", "depths=2"], "depths=[2.0]: at least one, each from 0 to 1"),
        (["RUN", "suite=recall", "probes=needle"], "probes=needle: choose from passkey"),
        (["RUN", "suite=recall", "lengths=64-128"], "lengths=64-128 is neither FIRST..LAST"),
        (["RUN", "suite=recall", "lengths=16"], "lengths=16: no question fits"),
        (["contexts=64..128"], "run= is missing"),
        (["RUN", "context=64"], "context=64: not known"),
        (["RUN", "contexts=64-128"], "contexts=64-128 is neither"),
        (["RUN", "contexts=128..64"], "contexts=128..64 is neither"),
        (["RUN", "contexts=64..65536"], "contexts=65536 leaves no target"),
        (["RUN", "limit=few"], "limit=few: must be a whole number"),
        (["RUN", "limit=0"], "limit=0 leaves no document"),
        (["RUN", "suite=glue"], "suite=glue is not known; use one of perplexity"),
        (["RUN", "suite=lra"], "use python -m evals.lra"),
        (["RUN", "suite=all", "context=64"], "context=64: not known"),
        (["RUN", "suite=extrapolation", "multiples=1/3,1"], "multiples=1/3,1: 1/3 of the"),
        (["RUN", "suite=extrapolation"], "only 4 of 4 documents have the 34 tokens"),
        (["RUN", "protocols=fixed,slide"], "protocols=fixed,slide"),
        (["RUN", "device=abacus"], "device=abacus cannot be used"),
        (["RUN", "tag=step_9"], "step_9: is not there"),
        (["RUN", "data=nowhere"], "nowhere"),
        (["RUN", "split=test"], "split=test"),
        (["RUN", "detokenize=html"], "detokenize=html: use detokenize=wikitext"),
        (["run=nowhere"], "run=nowhere: no such folder"),
        (["RUN", "suite=all", "name=x"], "name= names one suite's folder"),
        (["rebuild"], "run= is missing"),
        (["rebuild", "run=nowhere"], "nowhere/eval/perplexity/facts.json: cannot be read"),
        (["rebuild", "RUN", "suite=all"], "suite=all is not known"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(run, words, message, capsys):
    words = [f"run={run}" if word == "RUN" else word for word in words]
    assert evaluate.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert "Traceback" not in shown
    assert not (run / "eval" / "perplexity" / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["candidates=1"], "candidates=1: must be at least 2"),
        (["depths=0,half"], "depths=0,half is no list of shares"),
        (["lengths=16"], "lengths=16: no question fits"),
        (["min_documents=5"], "min_documents=5: only 4 of 4 documents"),
        (["limit=2", "min_documents=2"], "recall holds an evaluation of 4 documents"),
    ],
)
def test_options_of_all_suites_are_checked_before_the_first_one_scores(run, words, message, capsys):
    fingerprint = Corpus.open(subject.load_model(run, "latest")[1].data.path).fingerprint
    (run / "eval" / "recall").mkdir(parents=True)
    larger = {"data": {"fingerprint": fingerprint, "split": "validation", "n_docs": 4}}
    (run / "eval" / "recall" / "facts.json").write_text(json.dumps(larger))
    good = ["contexts=16,32", "min_documents=4", "concat_tokens=0", "trials=2"]
    words = [*(word for word in good if word.split("=")[0] not in "".join(words)), *words]
    assert evaluate.main([f"run={run}", "suite=all", *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (run / "eval").iterdir()] == ["recall"]


@pytest.mark.parametrize("suite", evaluate.SUITES)
def test_two_evaluations_of_one_folder_exclude_each_other(run, suite, capsys):
    folder = run / "eval" / suite
    words = [f"run={run}", f"suite={suite}", "device=cpu"]
    if suite == "extrapolation":
        words += ["multiples=1/2..2", "min_documents=4"]
    with lock_folder(folder, AssertionError()):
        (folder / "result.json").write_text("the other one's")
        assert evaluate.main(words) == 2
        assert "another evaluation is writing there; wait for it" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == ["result.json"]


def test_another_tokenizer_of_the_same_size_is_refused(run, monkeypatch, capsys):
    load_model = subject.load_model

    def trained_with_another(run_dir, tag):
        model, config, info = load_model(run_dir, tag)
        return model, config, {**info, "tokenizer": "0" * 64}

    monkeypatch.setattr(subject, "load_model", trained_with_another)
    assert evaluate.main([f"run={run}", "contexts=16,64"]) == 2
    assert "was trained with (000000000000)" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(run, monkeypatch, capsys):
    load_model = subject.load_model

    def a_newer_one_is_damaged(run_dir, tag):
        model, config, info = load_model(run_dir, tag)
        return model, config, {**info, "passed_over": ["step_00000002 is not complete"]}

    monkeypatch.setattr(subject, "load_model", a_newer_one_is_damaged)
    assert evaluate.main([f"run={run}", "contexts=16", "protocols=stream"]) == 0
    assert "passed over: step_00000002 is not complete" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "start_id"), [("lanes", BOS_ID), ("windows", EOS_ID)])
def test_documents_begin_behind_what_preceded_them_in_training(run, monkeypatch, mode, start_id):
    load_model = subject.load_model

    def trained_in(run_dir, tag):
        model, config, info = load_model(run_dir, tag)
        config.data.mode = mode
        return model, config, info

    monkeypatch.setattr(subject, "load_model", trained_in)
    assert evaluate.main([f"run={run}", "contexts=16", "protocols=stream"]) == 0
    result = json.loads((run / "eval" / "perplexity" / "result.json").read_text())
    assert result["model"]["start_id"] == start_id


def test_failed_gate_exits_with_3_and_leaves_no_report(run, monkeypatch, capsys):
    assert evaluate.main([f"run={run}", "contexts=16,64", "protocols=fixed"]) == 0
    original = subject.LanguageModelScorer.nll

    def leaks(self, tokens, state=None, *, score_from=0):
        nll, after = original(self, tokens, state, score_from=score_from)
        return nll + tokens[:, -1:].float(), after

    monkeypatch.setattr(subject.LanguageModelScorer, "nll", leaks)
    assert evaluate.main([f"run={run}", "contexts=16,64", "protocols=fixed"]) == 3
    assert "gate future_perturbation failed" in capsys.readouterr().err
    assert not (run / "eval" / "perplexity" / "result.json").exists()
    assert not (run / "eval" / "perplexity" / "report.html").exists()


def test_context_ranges_double():
    assert parse_contexts("64..8192") == tuple(64 * 2**k for k in range(8))
    assert parse_contexts("64..100") == (64,)
    assert parse_contexts("48,512") == (48, 512)
