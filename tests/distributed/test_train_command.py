"""launch/train.py as a user runs it: a Block-State Transformer, two processes, stop and go on."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from launch import prepare
from launch import train as train_command
from pretrain.config import load_config, load_saved_config, save_config
from pretrain.training.engine import World
from pretrain.training.load import load_model
from tests.distributed.launching import REPOSITORY, finish, start

MODEL = """
model:
  d_model: 32
  n_layers: 2
  layers: {pattern: [bst, swa]}
  mixers:
    swa: {n_heads: 2, window_size: 16}
    bst: {n_heads: 2, block_size: 16, n_modes: 4, chunk_size: 16}
  d_ff: 64
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    sentence = "in the beginning was a small corpus of bytes for a test and it was enough, "
    for split, count in (("train", 6), ("validation", 3)):
        texts = [(sentence[i:] + sentence[:i]) * 8 for i in range(count)]
        rows = (json.dumps({"text": text}) for text in texts)
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    arguments = [f"data={folder}/train.jsonl", f"splits.validation={folder}/validation.jsonl"]
    assert prepare.main([*arguments, "tokenizer=bytes", f"out={folder}/out", "workers=1"]) == 0
    return folder / "out"


@pytest.fixture
def arguments(corpus: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "model.yaml").write_text(MODEL)
    return [
        f"model={tmp_path}/model.yaml",
        f"data.path={corpus}",
        f"out_dir={tmp_path}/runs",
        "name=tiny",
        "train.seq_len=32",
        "train.global_batch_tokens=256",
        "train.micro_batch_size=2",
        "train.total_tokens=5120",
        "train.carry_state=true",
        "optim.learning_rate=1e-2",
        "eval.documents=3",
        "eval.tokens_per_document=128",
        "logging.every_steps=1",
    ]


def rows_of(run: Path, key: str) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that hold `key`."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if key in row]


@pytest.mark.distributed
def test_stopped_by_sigterm_and_started_again_the_command_finishes(
    arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "tiny"
    script = REPOSITORY / "launch" / "train.py"
    long = [*arguments, "train.total_tokens=2560000", "profile.steps=1:2"]
    process = start(script, long, processes=2)
    pid = second_rank(process.stdout)
    while process.poll() is None and len(rows_of(run, "loss")) < 3:
        time.sleep(0.05)
    if process.poll() is None:
        os.kill(pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == train_command.PREEMPTED, output[-4000:]
    assert re.search(r"step +0  memory horizon in tokens, median/max: bst\[0\] \d+/[\d,]+", output)
    stopped_at = len(rows_of(run, "loss"))
    assert (run / "checkpoints" / "latest").read_text() == f"step_{stopped_at:08d}\n"
    assert not (run / "DONE").exists()

    total = stopped_at + 5
    code, output = finish(
        start(script, [*arguments, f"train.total_tokens={total * 256}"], processes=2)
    )
    assert code == train_command.FINISHED, output[-4000:]
    assert f"resumed from {run}/checkpoints/step_{stopped_at:08d}" in output
    assert f"changed   train.total_tokens: 2560000 -> {total * 256}" in output
    assert json.loads((run / "DONE").read_text()) == {"step": total, "tokens": total * 256}
    rows = rows_of(run, "loss")
    assert [row["step"] for row in rows] == list(range(1, total + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5  # it learns
    assert [row["step"] for row in rows_of(run, "val/bpb")] == [total]
    horizons = rows_of(run, "health/0.bst/memory_horizon/max")
    assert [row["step"] for row in horizons] == [0, total]  # not again where it went on
    written = [row["step"] for row in rows_of(run, "time")]
    assert written == sorted(written)

    model, config, info = load_model(run)
    assert config.model == load_saved_config(run / "config.yaml").model
    assert (info["step"], info["tokens"]) == (total, total * 256)
    with torch.no_grad():
        tokens = torch.randint(0, 256, (1, 33))
        output = model(tokens[:, :-1], targets=tokens[:, 1:])
    assert output.loss_sum.isfinite()
    (first, _) = sorted((run / "checkpoints" / f"step_{total:08d}").glob("carried_*.pt"))
    carried = torch.load(first, weights_only=True)
    assert len(carried) == len(tree_leaves(output.state))
    files = "config.yaml environment.json metrics.jsonl tensorboard train.log checkpoints DONE lock"
    assert {path.name for path in run.iterdir()} == {*files.split(), "profile"}
    assert len(list((run / "profile").iterdir())) == 2


def second_rank(lines: Iterator[str] | None) -> int:
    """Reads the launcher's lines until it has told the second rank's process id."""
    assert lines is not None
    spawned = (re.search(r"process (\d+) spawned", line) for line in lines)
    pids = (int(match[1]) for match in spawned if match)
    next(pids)
    return next(pids)


BAD_INPUT = {
    "unknown key": ("train.seqlen=64", "did you mean 'train.seq_len'?"),
    "wrong type": ("train.seq_len=long", "train.seq_len=long"),
    "batch that does not divide": ("train.global_batch_tokens=300", "nearest: 256 or 320"),
    "no corpus": ("data.path=/nowhere", "corpus /nowhere: no manifest.json"),
    "other vocabulary": ("model.vocab_size=100", "model.vocab_size=100: the tokenizer of"),
    "grid": ("train.seq_len=8", "not a multiple of the model's reset grid 16"),
    "state without end": ("model.layers.pattern=[attention,swa]", "use train.carry_state=false"),
    "unwritable folder": ("out_dir=/dev/null/runs", "out_dir: cannot write to /dev/null/runs/"),
    "long validation": ("eval.tokens_per_document=100000", "the longest document of split"),
    "no data": ("data.path=", "pick data=NAME (a dry_run=true needs none)"),
    "ignored by DeepSpeed": ("zero.extra.zero_optimisation.stage=2", "'zero_optimization'"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_clear_error_before_any_process_group(
    name: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argument, message = BAD_INPUT[name]
    assert train_command.main([*arguments, argument]) == train_command.BAD_INPUT
    assert not torch.distributed.is_initialized()
    printed = capsys.readouterr().err
    assert printed.count("error: ") == 1
    assert message in printed
    assert not list(tmp_path.rglob("step_*"))


def test_dry_run_prints_the_plan_and_writes_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train_command.main([*arguments, "dry_run=true", "world_size=4"])
    assert code == train_command.FINISHED
    printed = capsys.readouterr().out
    for word in ("commit", "parameters by layer kind", "train FLOPs per token", "fingerprint"):
        assert word in printed
    assert "micro batch 2 x 32 tokens x 4 ranks x 1 accumulation" in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("model", ["swa_tiny", "bst_125m", "mega_paper_wt103"])
def test_dry_run_of_a_shipped_model_needs_neither_data_nor_vocabulary(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command.main([f"model={model}", "dry_run=true"]) == train_command.FINISHED
    printed = capsys.readouterr().out
    assert "planned for a vocabulary of 32,128" in printed
    assert "parameters by layer kind" in printed


def test_dry_run_takes_the_vocabulary_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["model=swa_tiny", "dry_run=true", "model.vocab_size=1000", "world_size=8"]
    assert train_command.main([*arguments, "train.micro_batch_size=1"]) == train_command.FINISHED
    printed = capsys.readouterr().out
    assert "planned for a vocabulary of 1,000" in printed
    assert "8 ranks x 2 accumulation" in printed


def test_dry_run_refuses_segments_that_windows_do_not_divide(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["model=bst_125m", "dry_run=true", "train.seq_len=256"]
    assert train_command.main(arguments) == train_command.BAD_INPUT
    assert "train.seq_len=256: not a multiple" in capsys.readouterr().err


def test_refused_resume_leaves_the_runs_configuration_as_it_was(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("another model")

    world = World(0, 1, torch.device("cpu"))
    monkeypatch.setattr(train_command, "start_process_group", lambda config: world)
    monkeypatch.setattr(train_command, "Trainer", refuse)
    saved = tmp_path / "runs" / "tiny" / "config.yaml"
    saved.parent.mkdir(parents=True)
    save_config(load_config(arguments), saved)
    content = saved.read_bytes()
    assert train_command.main([*arguments, "model.d_ff=128"]) == train_command.BAD_INPUT
    assert saved.read_bytes() == content


def test_bug_in_training_keeps_its_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Buggy:
        def fit(self) -> bool:
            raise ValueError("not enough values to unpack")

    monkeypatch.setattr(train_command, "set_up", lambda arguments: Buggy())
    with pytest.raises(ValueError, match="unpack"):
        train_command.main(arguments)
