"""Training curves of several runs: what is compared, how, and what is refused."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals import curves
from launch import evaluate
from pretrain.config import RunConfig, save_config

STEPS, BATCH = 40, 64


def write_run(
    folder: Path,
    name: str,
    final: float,
    bpb: float,
    *,
    rate: float = 3e-3,
    done: bool = True,
    fingerprint: str = "text",
    **changes: Any,
) -> Path:
    """A run directory whose loss falls to `final` within half of its steps, logged every second."""
    config = RunConfig(name=name, out_dir=str(folder))
    config.optim.learning_rate = rate
    config.model.vocab_size, config.model.d_model = 16, changes.pop("d_model", 32)
    config.train.seq_len, config.train.global_batch_tokens = 16, BATCH
    config.train.micro_batch_size, config.train.total_tokens = 4, STEPS * BATCH
    for key, value in changes.items():
        setattr(config.train, key, value)
    run = folder / name
    checkpoint = run / "checkpoints" / "step_00000040"
    checkpoint.mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step_00000040\n")
    training = {"data": {"fingerprint": fingerprint}, "tokenizer": "pieces"}
    (checkpoint / "training.json").write_text(json.dumps(training))
    save_config(config, run / "config.yaml")
    rows: list[dict[str, float]] = [{"step": 0, "tokens": 0, "health/0.bst/memory_horizon/max": 7}]
    for step in range(2, STEPS + 1, 2):
        loss = final + max(0.0, 2 - step / 10)
        rows.append({"step": step, "tokens": step * BATCH, "loss": loss})
    rows.append({"step": STEPS, "tokens": STEPS * BATCH, "val/bpb": bpb})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        (run / "DONE").write_text("{}")
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """swa at two rates, the second better; bst, three seeds at one; slow, far behind."""
    folder = tmp_path / "runs"
    return [
        write_run(folder, "swa_tiny_learning_rate0.003", 4.2, 2.2),
        write_run(folder, "swa_tiny_learning_rate0.006", 4.0, 2.0, rate=6e-3),
        *(
            write_run(folder, f"bst_tiny_seed{k}", 3.9 + k / 100, 1.9 + k / 100, d_model=48)
            for k in range(3)
        ),
        write_run(folder, "slow_tiny", 5.0, 2.6, carry_state=True),
    ]


def test_table_has_each_row_at_its_best_rate_against_the_baseline(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["curves", *map(str, runs), f"out={tmp_path}/out", "baseline=swa_tiny", "last_steps=20"]
    assert evaluate.main(words) == 0
    with open(tmp_path / "out" / "rows.csv") as file:
        table = {row["row"]: row for row in csv.DictReader(file)}
    assert list(table) == ["bst_tiny", "swa_tiny", "slow_tiny"]  # lowest loss first
    assert float(table["swa_tiny"]["learning_rate"]) == 6e-3
    assert table["swa_tiny"]["at_edge_of_sweep"] == "True"
    assert float(table["swa_tiny"]["train_loss"]) == pytest.approx(4.0)
    assert float(table["bst_tiny"]["train_loss"]) == pytest.approx(3.91)
    assert float(table["bst_tiny"]["train_loss_spread"]) == pytest.approx(0.02)
    assert float(table["bst_tiny"]["validation_bpb"]) == pytest.approx(1.91)
    assert table["bst_tiny"]["seeds"] == "3"
    assert float(table["bst_tiny"]["relative_loss"]) == pytest.approx(3.91 / 4 - 1)
    assert {row: record["outside_bound"] for row, record in table.items()} == {
        "bst_tiny": "False",
        "swa_tiny": "False",
        "slow_tiny": "True",
    }
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "out" / "rows.md").read_text())
    assert "| slow_tiny | 0.003 | 1 | 5.0000 | 2.6000 | +25.00% | outside 10% |" in printed
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_final_loss_weighs_tokens_and_reaches_back_no_further_than_asked() -> None:
    config = RunConfig()
    config.train.global_batch_tokens = 10
    tokens, loss = np.array([10, 40, 50]), np.array([9.0, 3.0, 1.0])
    run = curves.TrainingRun("row", config, ("", ""), tokens, loss, 0.0)
    assert run.final_loss(1) == 1
    assert run.final_loss(3) == pytest.approx((2 * 3 + 1) / 3)
    assert run.final_loss(5) == pytest.approx((9 + 3 * 3 + 1) / 5)
    assert run.final_loss(50) == run.final_loss(5)


def test_unfinished_runs_are_named_and_left_out(runs: list[Path], tmp_path: Path) -> None:
    half = write_run(tmp_path, "bst_tiny_seed3", 1.0, 1.0, done=False, d_model=48)
    failed = tmp_path / "mega_tiny"
    failed.mkdir()
    text = curves.write([*runs, half, failed], tmp_path / "out", baseline="swa_tiny")
    for path in (half, failed):
        assert f"left out: {path} has not finished" in text
    assert "| bst_tiny | 0.003 | 3 |" in text


def test_labels_lie_apart_beside_the_axis_in_the_order_of_the_losses(tmp_path: Path) -> None:
    found = []
    for k in range(19):
        final = 4.0 if k < 18 else 9.0  # all but one end in the same place
        tokens = np.arange(1, 11) * 1000
        loss = np.linspace(8.0, final + k / 1000, 10)
        found.append(curves.TrainingRun(f"row{k}", RunConfig(), ("", ""), tokens, loss, 2.0))
    rows = curves.rows_of(found, 1)
    axis = curves.figure(rows, rows[3]).axes[1]
    low, high = axis.get_ylim()
    labels = {text.get_text().split()[0]: text.get_position()[1] for text in axis.texts}
    assert list(labels) == [f"row{k}" for k in range(19)]
    places = np.array(list(labels.values()))
    assert np.diff(places).min() > (high - low) / 25
    assert low <= places.min() < places.max() <= high + 1e-9
    assert high <= 20  # the one far off is cut, or the others would be one line
    extra = curves.TrainingRun("row19", RunConfig(), ("", ""), tokens, loss, 2.0)
    with pytest.raises(ValueError, match="20 rows: at most 19"):
        curves.figure(curves.rows_of([*found, extra], 1), rows[0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "other"}, "have another text: text, other"),
        ({"total_tokens": 2 * STEPS * BATCH}, "differ in train.total_tokens: 2560, 5120"),
        ({"seq_len": 8}, "differ in train.seq_len: 16, 8"),
        ({"precision": "fp32"}, "differ in train.precision"),
    ],
)
def test_runs_that_do_not_compare_are_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    runs = [
        write_run(tmp_path, "swa_tiny", 4.0, 2.0),
        write_run(tmp_path, "mamba2_tiny", 4.0, 2.0, **changes),
    ]
    with pytest.raises(ValueError, match=reason):
        curves.write(runs, tmp_path / "out", baseline="swa_tiny")
    assert not (tmp_path / "out").exists()


def test_seeds_of_one_row_must_be_of_one_model(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"bst_tiny_seed{k}", 4.0, 2.0, d_model=48 + k) for k in (0, 16)]
    with pytest.raises(ValueError, match=r"of one row, differ in model.d_model: 48, 64"):
        curves.write(runs, tmp_path / "out", baseline="bst_tiny")


def test_an_unknown_baseline_is_refused_with_the_rows_there_are(tmp_path: Path) -> None:
    run = write_run(tmp_path, "swa_tiny_seed0", 4.0, 2.0)
    with pytest.raises(ValueError, match="baseline=swa: no such row; choose from swa_tiny"):
        curves.write([run], tmp_path / "out", baseline="swa")
