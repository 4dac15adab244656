"""`python -m evals.throughput` and `python -m evals.throughput.ops`, from words to files."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals.throughput import __main__ as command
from evals.throughput import ops
from evals.throughput.__main__ import ThroughputArguments as Arguments
from evals.throughput.__main__ import main, plan
from pretrain.training.environment import REPOSITORY
from tests.evals.throughput.tiny import write_model


def words_for(folder: Path, loops: str) -> list[str]:
    """A command line that times a tiny model in a second or so."""
    model = f"models={write_model(folder)} precision=fp32 compile=false vocab_size=64 device=cpu"
    return f"{model} lengths=32 tokens=64 loops={loops} seconds=0.01 out={folder}".split()


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The table, as words."""
    with open(folder / "throughput.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_trainer_is_timed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_for(tmp_path, "trainer")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "first step" in shown
    assert "tokens/s, " in shown.partition("| model |")[0]  # in front of the table
    (row,) = rows_of(tmp_path)
    assert row["status"] == "ok"
    assert float(row["tokens_per_second"]) > 0
    assert "| trainer | 2 x 32 |" in (tmp_path / "throughput.md").read_text()
    assert (tmp_path / "throughput.png").read_bytes().startswith(b"\x89PNG")
    assert main(words) == 0
    assert "measured before" in capsys.readouterr().out


@pytest.mark.parametrize("loop", ["deepspeed", "trainer"])
def test_the_stage_of_zero_is_taken_and_stated(tmp_path: Path, loop: str) -> None:
    assert main([*words_for(tmp_path, loop), "zero_stage=0"]) == 0
    assert rows_of(tmp_path)[0]["status"] == "ok"
    assert "DeepSpeed with ZeRO stage 0" in (tmp_path / "throughput.md").read_text()


def test_a_narrow_residual_stream_is_timed_and_stated(tmp_path: Path) -> None:
    words = [w for w in words_for(tmp_path, "plain") if not w.startswith("precision")]
    assert main([*words, "precision=bf16", "residual_in_fp32=false"]) == 0
    (row,) = rows_of(tmp_path)
    assert (row["status"], row["residual_in_fp32"]) == ("ok", "False")
    assert "residual stream of our models in bf16" in (tmp_path / "throughput.md").read_text()


def test_compiling_alone_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(command, "compile_all", lambda every, *_: compiled.extend(map(str, every)))
    words = [w for w in words_for(tmp_path, "plain") if not w.startswith("compile")]
    assert main([*words, "compile_only=true"]) == 0
    assert len(compiled) == 1
    assert not (tmp_path / "throughput.md").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_script_of_all_speeds_runs_to_its_end_and_then_finds_everything(tmp_path: Path) -> None:
    sizes = {"SPEED": str(tmp_path), "SIZE": "tiny", "T": "128", "MEGA_TOKENS": "128", "OPS": ""}
    words = ["device=cpu", "compile=false", "vocab_size=64", "seconds=0.01"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | sizes | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    for again in (False, True):
        run = subprocess.run(
            [REPOSITORY / "launch" / "speed.sh", *words],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-4000:]
        assert ("measured before" in run.stdout) == again
    rows = [
        row for table in sorted(tmp_path.glob("*/throughput.csv")) for row in rows_of(table.parent)
    ]
    ours = [row for row in rows if row["model"].endswith("_tiny")]
    assert len(ours) == 24
    assert {row["status"] for row in ours} == {"ok"}
    assert (tmp_path / "speed.md").read_text().count("### ") == len(list(tmp_path.glob("*/*.csv")))


@pytest.mark.slow
def test_all_loops_train_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words_for(tmp_path, "plain,deepspeed,trainer")) == 0
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == ["ok", "ok", "ok"]
    assert len({row["parameters"] for row in rows}) == 1
    shown = capsys.readouterr().out
    assert "tiny, 2 x 32: DeepSpeed adds" in shown
    assert "tiny, 2 x 32: the trainer adds" in shown


def test_micro_batches_have_equal_tokens_and_at_least_one_sequence() -> None:
    groups = plan(Arguments(models="swa_tiny", peers="llama", lengths="128,512,4096", tokens="512"))
    sizes = [(m.model, m.length, m.batch_size) for group in groups for m in group]
    assert sizes == [
        (model, length, batch_size)
        for length, batch_size in ((128, 4), (512, 1), (4096, 1))
        for model in ("swa_tiny", "llama")
    ]


@pytest.mark.parametrize("stage", [0, 2])
def test_the_stage_is_that_of_the_run(stage: int) -> None:
    arguments = Arguments(models="swa_tiny", lengths="128", loops="trainer", zero_stage=stage)
    assert plan(arguments)[0][0].config().zero.stage == stage


def test_a_measurement_depends_on_nothing_that_does_not_reach_it() -> None:
    def identity(model: str, **words: Any) -> dict[str, Any]:
        every = [m for group in plan(Arguments(lengths="128", **words)) for m in group]
        return next(m for m in every if m.model == model).identity("a GPU")

    alone = identity("swa_tiny", models="swa_tiny")
    assert identity("swa_tiny", models="bst_tiny,swa_tiny") == alone
    assert identity("swa_tiny", models="swa_tiny", like="bst_tiny") == alone
    assert identity("swa_tiny", models="swa_tiny", zero_stage=2) == alone
    stages = [
        identity("swa_tiny", models="swa_tiny", loops="deepspeed", zero_stage=stage)
        for stage in (1, 2)
    ]
    assert stages[0] != stages[1]
    peer = identity("llama", models="", peers="llama", like="swa_tiny")
    assert identity("llama", models="swa_tiny", peers="llama", zero_stage=2) == peer
    assert identity("llama", models="bst_tiny", peers="llama") != peer


def test_auto_tries_every_size_once_smallest_first() -> None:
    groups = plan(Arguments(models="swa_tiny", lengths="32768", tokens="auto"))
    assert [m.batch_size for m in groups[0]] == [1, 2, 4]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("peers=lama", "peers=lama: not known; use llama"),
        ("loops=bare", "loops=bare: not known"),
        ("precision=fp8", "precision=fp8"),
        ("precision=bf16_weights models=swa_tiny", "give models= like=swa_tiny"),
        ("models= peers=llama", "like= is missing"),
        ("models=", "both empty"),
        ("models=swa_tinny", "did you mean 'swa_tiny'"),
        ("models= peers=llama like=swa_tiny loops=trainer", "plain loop only"),
        ("tokens=many", "tokens=many"),
        ("tokens=0,512", "tokens=0,512: must be at least 1, or auto"),
        ("seconds=0", "greater than 0"),
        ("residual_in_fp32=false precision=fp32", "there is none; use precision=bf16"),
        ("lengths=0", "at least 1"),
        ("zero_stage=4", "zero_stage=4: use 0, 1, 2 or 3"),
        ("compile_only=true compile=false", "leave one of them out"),
    ],
)
def test_bad_words_are_refused_with_the_reason(
    words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "device=cpu"]) == 2
    assert reason in capsys.readouterr().err


def test_too_few_workers_are_refused_by_their_number() -> None:
    with pytest.raises(ValueError, match="compile_workers=-3: must be at least 1"):
        plan(Arguments(models="swa_tiny", compile_workers=-3))


@pytest.mark.parametrize("start", [main, lambda words: ops.main(["ssm", *words])])
def test_the_index_of_a_gpu_is_refused_with_the_way_to_choose_one(
    start: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(["device=cuda:1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: device=cuda:1: processes take the first GPU")
    assert "use device=cuda with CUDA_VISIBLE_DEVICES=1" in told


@pytest.mark.parametrize(
    ("words", "forms"),
    [
        (
            "ssm tokens=32 d_model=4 chunk_size=8 compile=false",
            ["torch.fft", "chunked", "chunked, operators for 8 micro-batches"],
        ),
        ("bst_layer d_model=16 n_heads=2 window=8 compile=false", ["bst", "block_recurrent"]),
        (
            "window_attention tokens=32 n_heads=1 head_dim=8 window=8",
            ["window 8", "all keys, SDPA"],
        ),
    ],
)
def test_operators_are_timed_beside_their_error(
    words: str, forms: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ops.main([*words.split(), "lengths=16,32", "device=cpu", f"out={tmp_path}"]) == 0
    name = words.split()[0]
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert [row["form"] for row in rows] == 2 * forms
    assert all(row["forward"]["ms"] > 0 for row in rows)
    largest = 2e-2 if name == "bst_layer" else 1e-4  # bf16 autocast, fp32
    assert all(0 < row["error"] < largest for row in rows if row["error"] is not None)
    if name == "bst_layer":
        assert "32 tokens: " in capsys.readouterr().out


def test_an_unknown_operator_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert ops.main(["smm"]) == 2
    assert "use ssm, bst_layer, window_attention" in capsys.readouterr().err
