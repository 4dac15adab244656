"""What encoder-decoders are trained and validated on, and what is refused before a run begins."""

import json
from pathlib import Path

import pytest
import torch

from data.denoising_loader import corruptions_of
from data.prepare import PrepareConfig, prepare
from data.tokenizer import PAD_ID, BytesTokenizer
from launch import train
from launch.denoising_data import open_denoising_validation, target_length
from launch.prepare import load_prepare_config
from pretrain.config import load_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [" ".join(f"{i * 7919 % (500 + k)} waves. " for i in range(100)) for k in range(3)]
    source = folder / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    splits = {"train": str(source), "validation": str(source)}
    prepare(PrepareConfig(out=str(folder / "out"), splits=splits, tokenizer="bytes", n_sentinels=8))
    return folder / "out"


def arguments(corpus: Path, *more: str) -> list[str]:
    batch = ["train.seq_len=64", "train.global_batch_tokens=256", "train.micro_batch_size=2"]
    return ["model=spade_t5_tiny", f"data.path={corpus}", *batch, "eval.documents=2", *more]


def test_the_first_screen_tells_what_is_read_and_written(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(arguments(corpus, "dry_run=true")) == train.FINISHED
    screen = capsys.readouterr().out
    assert "objective = span" in screen
    assert "encoder spade" in screen
    assert "cross attention" in screen


@pytest.mark.parametrize(("objective", "length"), [("causal", 0), ("span", 114), ("ul2", 512)])
def test_targets_are_as_long_as_the_objective_makes_them(objective: str, length: int) -> None:
    model = "swa_tiny" if objective == "causal" else "spade_t5_tiny"
    config = load_config([f"model={model}", f"objective={objective}", "train.seq_len=512"])
    assert target_length(config) == length


@pytest.mark.parametrize("objective", ["span", "gap"])
def test_validation_is_the_same_at_every_call_and_of_the_documents_asked_for(
    objective: str, corpus: Path
) -> None:
    rows = []
    for seed in (0, 1):  # of training; the questions do not depend on it
        changes = [f"objective={objective}", f"seed={seed}", "eval.tokens_per_document=128"]
        rows.append(open_denoising_validation(load_config(arguments(corpus, *changes))))
    assert all(torch.equal(one, other) for one, other in zip(*rows, strict=True))
    assert len(rows[0].loss_mask) == 2 * 2  # documents, and inputs of 64 tokens that cover 128


def test_a_mixtures_validation_has_each_denoiser_and_room_for_the_longest_targets(
    tmp_path: Path, corpus: Path
) -> None:
    source = corpus.parent / "texts.jsonl"
    splits = {"train": str(source), "validation": str(source)}
    out = tmp_path / "out"
    prepare(PrepareConfig(out=str(out), splits=splits, tokenizer="bytes", n_sentinels=40))
    config = load_config(arguments(out, "objective=ul2", "eval.tokens_per_document=1"))
    rows = open_denoising_validation(config)
    assert len(rows.loss_mask) == 7 * 2
    assert rows.loss_mask.shape[1] == target_length(config)
    assert len(set(rows.loss_mask.sum(1).tolist())) > 2
    assert torch.equal(rows.loss_mask, rows.decoder_tokens[:, 1:] != PAD_ID)


@pytest.mark.parametrize("objective", ["span", "ul2", "gap"])
def test_the_bundled_books_have_sentinels_for_every_objective_of_the_quick_run(
    objective: str,
) -> None:
    config = load_config(["experiment=denoise_tiny", f"objective={objective}"])
    stock = load_prepare_config(["data=books_denoising"])
    tokenizer = BytesTokenizer(stock.n_sentinels)  # how many are needed asks no tokenizer
    needed = [c.n_sentinels(config.train.seq_len) for c in corruptions_of(objective, tokenizer)]
    assert max(needed) <= stock.n_sentinels


BAD_INPUT = {
    "a decoder alone": (
        ["model=swa_tiny", "objective=span"],
        "objective=span: it is for encoder-decoders, and the model has no encoder",
    ),
    "an encoder left idle": (
        ["objective=causal"],
        "objective=causal: the model has an encoder (model.encoder.n_layers=4)",
    ),
    "no such objective": (["objective=spam"], "objective=spam: must be one of causal, span"),
    "too few sentinels": (
        ["train.seq_len=256", "train.global_batch_tokens=1024"],
        "n_sentinels=8: objective=span with encoder_length=256 needs 14",
    ),
    "nothing to mask": (
        ["train.seq_len=2", "train.global_batch_tokens=4"],
        "train.seq_len=2, objective=span: encoder_length=2: nothing can be masked",
    ),
    "documents in lanes": (["data.mode=lanes"], "use data.mode=windows"),
    "text that is streamed": (["data.mode=stream"], "use data.mode=windows"),
    "documents set apart": (["data.boundary=pad_block"], "documents stand side by side in them"),
    "several corpora": (
        ["data.mixture=[{path: a}, {path: b}]"],
        "data.mixture with objective=span: one corpus is read",
    ),
    "a carried state": (["train.carry_state=true"], "train.carry_state=true with data.mode"),
    "no validation split": (["data.val_split=test"], "test"),
    "an encoder that only looks back": (
        ["model.encoder.layers.default=mamba2"],
        "mixer 'mamba2' has no two-sided form",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_clear_error_before_any_process_group(
    name: str, corpus: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    changes, message = BAD_INPUT[name]
    given = {argument.partition("=")[0]: argument for argument in arguments(corpus)}
    given |= {argument.partition("=")[0]: argument for argument in changes}
    assert train.main([*given.values(), f"out_dir={tmp_path}"]) == train.BAD_INPUT
    assert not torch.distributed.is_initialized()
    printed = capsys.readouterr().err
    assert printed.count("error: ") == 1
    assert message in printed


def test_targets_longer_than_the_decoder_knows_are_refused(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = "{n_heads: 2, filters: unstructured, train_length: 8, block_size: 8, chunk_size: 8}"
    decoder = ["model.layers.default=bst", f"model.mixers.bst={short}"]
    assert train.main(arguments(corpus, *decoder)) == train.BAD_INPUT
    assert "makes targets of 14 tokens of it" in capsys.readouterr().err
