"""Encoder-decoders by launch/train.py: the same losses at every ZeRO stage, and after a kill.

The model has what checkpoints lose: codebooks, state-space parameters, a tied head.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch import prepare
from pretrain.models import EncoderDecoder
from pretrain.training.load import load_any_model, load_model
from tests.distributed.launching import finish, start

MODEL = """
model:
  d_model: 16
  encoder:
    n_layers: 2
    layers: {pattern: [spade, longvq]}
    mixers:
      spade: {n_heads: 2, window_size: 16, n_modes: 4, chunk_size: 16}
      longvq: {block_size: 16, chunk_size: 16, n_heads: 2, d_shared: 8, n_codes: 8, n_modes: 4}
  n_layers: 2
  layers: {pattern: [attention, swa]}
  mixers:
    attention: {n_heads: 2, position: t5}
    swa: {n_heads: 2, window_size: 16}
  cross_attention: {n_heads: 2}
  d_ff: 32
objective: ul2
data: {mode: windows}
"""
STEPS, ROWS, S = 4, 4, 64
STAGES = (0, 1, 3)
SAME = 1e-5  # fp32 sums in another order
GROUPS = ("loss", "loss/sentinel", "loss/other")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    sentence = "in the beginning was a small corpus of bytes for a test and it was enough, "
    for split, count in (("train", 6), ("validation", 3)):
        texts = [(sentence[i:] + sentence[:i]) * 12 for i in range(count)]
        rows = (json.dumps({"text": text}) for text in texts)
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    arguments = [f"data={folder}/train.jsonl", f"splits.validation={folder}/validation.jsonl"]
    arguments += ["tokenizer=bytes", "n_sentinels=40", f"out={folder}/out", "workers=1"]
    assert prepare.main(arguments) == 0
    return folder / "out"


def arguments(corpus: Path, folder: Path, name: str, stage: int, world_size: int) -> list[str]:
    (folder / "model.yaml").write_text(MODEL)
    return [
        f"model={folder}/model.yaml",
        f"data.path={corpus}",
        f"out_dir={folder}",
        f"name={name}",
        f"train.seq_len={S}",
        f"train.global_batch_tokens={ROWS * S}",
        f"train.micro_batch_size={ROWS // 2 // world_size}",
        f"train.total_tokens={STEPS * ROWS * S}",
        "train.precision=fp32",
        "optim.learning_rate=1e-2",
        f"zero.stage={stage}",
        # Partition even the smallest parameters, or ZeRO-3 keeps this whole model whole.
        "zero.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}",
        f"checkpoint.every_tokens={2 * ROWS * S}",
        "eval.documents=2",
        f"eval.tokens_per_document={3 * S}",
        "logging.every_steps=1",
        "logging.tensorboard=false",
    ]


def train(
    corpus: Path,
    folder: Path,
    runs: list[tuple[str, int, int | None]],
    world: int,
    *words: str,
) -> None:
    """Trains runs of (name, ZeRO stage, step to be abandoned before)."""
    spec = [
        [[*arguments(corpus, folder, name, stage, world), *words], abandon_at]
        for name, stage, abandon_at in runs
    ]
    (folder / "spec.json").write_text(json.dumps(spec))
    script = Path(__file__).with_name("denoising_run.py")
    code, output = finish(start(script, [str(folder / "spec.json")], processes=world))
    assert code == 0, output[-6000:]


def rows_of(run: Path, key: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if key in row]


def losses(run: Path) -> list[list[float]]:
    rows = rows_of(run, "loss")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [[row[key] for key in (*GROUPS, "grad_norm")] for row in rows]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each stage as a whole, and stages 1 and 3 killed behind step 3 and started again."""
    folder = tmp_path_factory.mktemp("runs")
    runs: list[tuple[str, int, int | None]] = []
    # Stage 3 is last: DeepSpeed leaves another F.linear behind it, whose sums round otherwise.
    for stage in STAGES:
        runs.append((f"whole{stage}", stage, None))
        if stage in (1, 3):
            runs += [(f"cut{stage}", stage, 3), (f"cut{stage}", stage, None)]
    train(corpus, folder, runs, world=1)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 3])
def test_killed_and_resumed_is_bit_identical(trained: Path, stage: int) -> None:
    cut, whole = trained / f"cut{stage}", trained / f"whole{stage}"
    assert "resumed from" in (cut / "train.log").read_text()
    assert losses(cut) == losses(whole)
    for key in ("val/loss", "val/loss/sentinel", "val/loss/other"):
        assert rows_of(cut, key)[-1][key] == rows_of(whole, key)[-1][key]


@pytest.mark.distributed
def test_every_zero_stage_trains_alike(trained: Path) -> None:
    want = losses(trained / "whole0")
    assert want[-1][0] < want[0][0]
    for stage in STAGES[1:]:
        for row, reference in zip(losses(trained / f"whole{stage}"), want, strict=True):
            assert row == pytest.approx(reference, rel=SAME)


@pytest.mark.distributed
def test_a_loss_lies_between_those_of_sentinels_and_other_targets(trained: Path) -> None:
    for loss, sentinel, other, _ in losses(trained / "whole0"):
        assert min(sentinel, other) < loss < max(sentinel, other)
    assert not rows_of(trained / "whole0", "bits_per_byte")  # no text's, of a damaged one


@pytest.mark.distributed
def test_the_trained_model_is_loaded_and_is_no_language_model(trained: Path) -> None:
    model, config, info = load_any_model(trained / "whole3")
    assert isinstance(model, EncoderDecoder)
    assert (config.objective, info["step"]) == ("ul2", STEPS)
    with pytest.raises(ValueError, match="it trained an encoder-decoder"):
        load_model(trained / "whole3")


@pytest.mark.distributed
def test_a_run_begins_with_the_weights_of_another_on_all_ranks(
    corpus: Path, trained: Path, tmp_path: Path
) -> None:
    """A step too small to change anything leaves the loss on validation as it was."""
    runs = [(f"stage{stage}", stage, None) for stage in (1, 3)]
    words = [f"train.init_from={trained / 'whole1'}", f"train.total_tokens={ROWS * S}"]
    still = ["optim.learning_rate=1e-30", "optim.ssm_learning_rate=1e-30"]
    newer = trained / "whole1/checkpoints/step_99999999"
    newer.mkdir()
    (newer / "manifest.json").write_text('{"step": 99999999, "tokens": 1, "files": {"a": {}}}')
    train(corpus, tmp_path, runs, 2, *words, *still)
    shutil.rmtree(newer)
    (want,) = rows_of(trained / "whole1", "val/loss")
    for name, _, _ in runs:
        told = (tmp_path / name / "train.log").read_text()
        assert "passed over: step_99999999 is not complete" in told
        assert "with the weights of" in told
        (found,) = rows_of(tmp_path / name, "val/loss")
        assert found["val/loss"] == pytest.approx(want["val/loss"], rel=SAME)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_train_and_validate_like_one(corpus: Path, trained: Path, tmp_path: Path) -> None:
    stages = (0, 1, 2, 3)
    train(corpus, tmp_path, [(f"two{stage}", stage, None) for stage in stages], world=2)
    for stage in stages:
        for row, reference in zip(
            losses(tmp_path / f"two{stage}"), losses(trained / "whole0"), strict=True
        ):
            assert row == pytest.approx(reference, rel=SAME)
        key = "val/loss/other"
        (found,), (want,) = (
            rows_of(run, key) for run in (tmp_path / f"two{stage}", trained / "whole0")
        )
        assert found[key] == pytest.approx(want[key], rel=SAME)
