"""What the command starts from: a run's weights, an older checkpoint's, or none of them."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from data.prepare import PrepareConfig, prepare
from data.tokenizer import EOS_ID, load_tokenizer
from evals.downstream import outputs
from launch import finetune
from pretrain.finetuning.encoder_decoder import PairEncoderDecoder
from pretrain.finetuning.generation import GenerationOptions, generate
from pretrain.finetuning.prompted import prompted
from pretrain.models import EncoderDecoder
from pretrain.training.load import load_any_model
from tests.distributed.launching import REPOSITORY, finish, start
from tests.launch.last_letter import ENCODER_DECODER, MODEL, WORDS, write_examples

KINDS = {"language_model": MODEL, "encoder_decoder": ENCODER_DECODER}
TOKENIZER = "corpus/tokenizer.model"
OLDER, NEWEST = "step_00000004", "step_00000008"

# One step of hardly any size: what is tested then, and kept, is what training started from.
STILL = WORDS | {"steps": "1", "learning_rate": "1e-12", "max_target_tokens": "6"}
del STILL["tokenizer"]  # a run knows its own

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, and runs/KIND of eight steps with a checkpoint halfway, on a corpus of its own."""
    folder = tmp_path_factory.mktemp("trained")
    write_examples(folder)
    texts = [" ".join(f"{i * 7919 % (500 + k)} xyz, ab. " for i in range(100)) for k in range(3)]
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    splits = {"train": str(source), "validation": str(source)}
    tokenizer = {"tokenizer": "unigram", "vocab_size": 300, "n_sentinels": 8}
    prepare(PrepareConfig(out=str(folder / "corpus"), splits=splits, **tokenizer))
    runs = []
    for kind, model in KINDS.items():
        (folder / f"{kind}.yaml").write_text(model)
        arguments = [
            f"model={folder}/{kind}.yaml",
            f"data.path={folder}/corpus",
            f"out_dir={folder}/runs",
            f"name={kind}",
            "data.mode=windows",  # in which EOS, not BOS, stands before a text
            "train.seq_len=32",
            "train.global_batch_tokens=64",
            "train.micro_batch_size=2",
            "train.total_tokens=512",
            "train.precision=fp32",
            "optim.learning_rate=1e-1",
            "checkpoint.every_tokens=256",
            "eval.documents=1",
            "eval.tokens_per_document=32",
            "logging.tensorboard=false",
        ]
        runs.append([arguments, None])
    (folder / "runs.json").write_text(json.dumps(runs))
    script = REPOSITORY / "tests" / "distributed" / "denoising_run.py"
    code, output = finish(start(script, [str(folder / "runs.json")], processes=1))
    assert code == 0, output[-4000:]
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def run(**changes: str) -> int:
    return finetune.main([f"{key}={value}" for key, value in {**STILL, **changes}.items()])


def left(out: Path, seed: int = 0) -> tuple[list[str], dict[str, torch.Tensor], float]:
    """What a seed answered, its weights, and the loss of its first batch."""
    folder = out / f"seed_{seed}"
    loss = json.loads((folder / "result.json").read_text())["history"][0]["loss"]
    weights = torch.load(folder / "best.pt", weights_only=True)
    return outputs.read(folder / "test.jsonl")[0], weights, loss


def weights_of(run: Path, tag: str) -> dict[str, torch.Tensor]:
    return dict(load_any_model(run, tag)[0].state_dict())


def all_but_constant(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Without the gains and biases that every model begins with."""
    return [weights[name] for name in sorted(weights) if weights[name].dim() > 1]


def answers_of(run: Path, tag: str) -> list[str]:
    """What a checkpoint answers to the tests without any fine-tuning."""
    model, _, _ = load_any_model(run, tag)
    is_pair = isinstance(model, EncoderDecoder)
    pairs = PairEncoderDecoder(model) if is_pair else prompted(model, start_id=EOS_ID)
    tokenizer = load_tokenizer(run.parents[1] / "corpus" / "tokenizer.model")
    rows = map(json.loads, (run.parents[1] / "test.jsonl").read_text().splitlines())
    inputs = [tokenizer.encode(row["text"]) for row in rows]
    return [tokenizer.decode(ids) for ids in generate(pairs, inputs, GenerationOptions(7))]


def complaint(capsys: pytest.CaptureFixture[str], code: int, **changes: str) -> str:
    assert run(out="refused", **changes) == code
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_a_runs_newest_weights_are_started_from_and_older_ones_with_their_tag(
    kind: str, here: Path
) -> None:
    found = []
    for name, words in {NEWEST: {}, OLDER: {"tag": OLDER}}.items():
        assert run(run=f"runs/{kind}", out=f"{kind}/{name}", **words) == 0
        answers, weights, loss = left(here / kind / name)
        torch.testing.assert_close(weights, weights_of(here / "runs" / kind, name))
        assert answers == answers_of(here / "runs" / kind, name)
        facts = outputs.read_settings(here / kind / name)["model"]
        assert (facts["checkpoint"], facts["weights"]) == (name, "trained")
        found.append((answers, loss))
    (newest, loss), (older, loss_of_older) = found
    assert newest != older
    assert abs(loss - loss_of_older) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_put_on_a_runs_weights(kind: str, here: Path) -> None:
    words = {"head": "classifier", "max_target_tokens": "0"}
    assert run(run=f"runs/{kind}", out=f"{kind}/head", **words) == 0
    _, weights, _ = left(here / kind / "head")
    expected = weights_of(here / "runs" / kind, NEWEST)
    torch.testing.assert_close({key: weights[f"model.{key}"] for key in expected}, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_each_seeds_own_and_those_of_the_model_alone(
    kind: str, here: Path
) -> None:
    control, alone = {"run": f"runs/{kind}", "init": "random"}, {"model": f"{kind}.yaml"}
    assert run(out=f"{kind}/random", seeds="2", **control) == 0
    assert run(out=f"{kind}/alone", seeds="2", tokenizer=TOKENIZER, **alone) == 0
    first, second = (left(here / kind / "random", seed)[1] for seed in (0, 1))
    for seed, weights in enumerate((first, second)):
        torch.testing.assert_close(weights, left(here / kind / "alone", seed)[1])
    trained = weights_of(here / "runs" / kind, NEWEST)
    assert not any(
        torch.equal(one, other)
        for pair in ((first, second), (first, trained))
        for one, other in zip(*(all_but_constant(weights) for weights in pair), strict=True)
    )
    assert outputs.read_settings(here / kind / "random")["model"]["weights"] == "random"


def test_a_moved_corpus_is_made_up_for_by_its_tokenizer(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"run": "runs/language_model"}
    assert run(out="before", **words) == 0
    corpus = (here / "corpus").rename(here / "elsewhere")
    try:
        told = complaint(capsys, finetune.BAD_INPUT, **words)
        assert f"run=runs/language_model: its tokenizer is that of {here / 'corpus'}, which" in told
        assert "cannot be read" in told
        assert told.endswith("; set tokenizer= to the .model file or bytes\n")
        assert run(out="after", tokenizer="elsewhere/tokenizer.model", **words) == 0
    finally:
        corpus.rename(here / "corpus")
    assert left(here / "before")[0] == left(here / "after")[0]


def test_what_does_not_fit_a_run_is_one_clear_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"run": "runs/language_model"}
    refused = partial(complaint, capsys, finetune.BAD_INPUT, **words)
    told = refused(tokenizer="bytes")
    assert "tokenizer=bytes: not the one that runs/language_model was trained with (" in told
    ours, theirs = load_tokenizer("bytes").sha256, load_tokenizer(TOKENIZER).sha256
    assert f"({ours[:12]}, not {theirs[:12]}); name that one's .model" in told
    told = complaint(capsys, finetune.FAILED, tag="step_00000005", **words)
    assert "step_00000005: manifest.json is missing" in told
    assert f"; there are: {OLDER}, {NEWEST}" in told
    assert "init=none is not known; use pretrained or random" in refused(init="none")
    told = refused(**{"model.d_model": "32"})
    assert "model.d_model=32: run=runs/language_model has its own; leave it out" in told
    assert not (here / "refused").exists()


def test_a_folder_keeps_its_checkpoint_and_its_start(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"run": "runs/language_model", "out": "kept"}
    assert run(**words) == 0
    for changes, told in (
        ({"tag": OLDER}, f"checkpoint was '{NEWEST}', is '{OLDER}'"),
        ({"init": "random"}, "weights was 'trained', is 'random'"),
    ):
        assert run(**words, **changes) == finetune.BAD_INPUT
        assert told in capsys.readouterr().err
