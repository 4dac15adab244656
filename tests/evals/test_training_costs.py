"""What trainings cost: warm steps alone count, and a run that cannot be read is refused."""

import csv
import json
from pathlib import Path

from launch import evaluate
from pretrain.config import load_config, save_config


def write_run(folder: Path, *, rows: int = 4, done: bool = True, compiled: bool = True) -> Path:
    """The first half of the rows is cold: slow, with a high loss."""
    config = load_config(["model=t5_tiny", "train.seq_len=128", f"train.compile={compiled}"])
    config.model.vocab_size = 64
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    (folder / "environment.json").write_text(json.dumps({"gpus": ["H0"], "device": "cuda:0"}))
    lines = []
    for index in range(rows):
        warm = index >= rows // 2
        row = {"loss": 4.0 - index if warm else 90.0, "memory_gib": 5.0 - index, "mfu": 0.25}
        row |= {"tokens_per_second": 1000.0 + index if warm else 1.0, "tflops_per_rank": 3.0}
        lines.append({"step": 10 * (index + 1), **row})
    lines.append({"step": 10 * rows, "val/loss": 1.5, "val/loss/other": 2.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (folder / "DONE").write_text("{}")
    return folder


def test_speed_and_loss_are_of_the_latter_half_and_memory_is_the_peak(tmp_path, capsys):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", compiled=False)]
    assert evaluate.main(["costs", *map(str, runs), f"out={tmp_path}/costs"]) == 0
    table = (tmp_path / "costs/costs.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    assert "compiled: no or yes" in table
    assert "on: H0; tokens per step: 8,192; steps: 40" in table
    first, second = csv.DictReader((tmp_path / "costs/costs.csv").read_text().splitlines())
    assert (first["run"], second["run"]) == ("a", "b")
    found = {key: float(first[key]) for key in ("tokens_per_second", "train_loss", "memory_gib")}
    assert found == {"tokens_per_second": 1002.5, "train_loss": 1.5, "memory_gib": 5.0}
    losses = [first[f"val/loss{group}"] for group in ("", "/sentinel", "/other")]
    assert losses == ["1.5", "", "2.5"]  # nothing is made up for what was not measured
    # d = 128: embedding 64 d; encoder layer 4 d^2 + 3 d 256 + 2 d + 2 heads; decoder 8 d^2 more.
    d = 128
    encoder = 4 * d * d + 3 * d * 256 + 2 * d + 2
    decoder = encoder + 4 * d * d + d + 2
    assert int(first["parameters"]) == 64 * d + 4 * (encoder + decoder) + 2 * d


def test_an_unfinished_run_is_left_out_and_said_to_be(tmp_path, capsys):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "unfinished", done=False)]
    assert evaluate.main(["costs", *map(str, runs), f"out={tmp_path}/costs"]) == 0
    told = capsys.readouterr().out
    assert f"Left out: {runs[1]} has not finished." in told
    assert "| unfinished |" not in told


def test_what_cannot_be_read_is_one_clear_line(tmp_path, capsys):
    unfinished = write_run(tmp_path / "unfinished", done=False)
    short = write_run(tmp_path / "short", rows=1)
    for words, complaint in (
        ([str(unfinished), "out=x"], "none of the runs has finished"),
        ([str(tmp_path / "none"), "out=x"], "none: no such folder"),
        ([str(short), "out=x"], "short: it logged 1 times"),
        ([str(short)], "costs needs runs and out="),
    ):
        assert evaluate.main(["costs", *words]) == evaluate.BAD_INPUT
        assert complaint in capsys.readouterr().err
