"""What a run reports, and that a resumed run continues its rows."""

import json
import math
from pathlib import Path

import pytest
import torch

from pretrain.training import metrics
from pretrain.training.metrics import (
    MetricLog,
    bits_per_byte,
    console_line,
    drop_rows_after,
    duration,
    peak_flops,
    short,
    speed,
)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_after_the_resumed_step_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(1, 8)) + '{"st')
    drop_rows_after(path, 5)
    assert steps_in(path) == [1, 2, 3, 4, 5]
    drop_rows_after(tmp_path / "none.jsonl", 5)
    assert not (tmp_path / "none.jsonl").exists()


def test_resumed_log_appends_to_what_it_kept(tmp_path: Path) -> None:
    for first, last, resumed_at in ((1, 6, 0), (4, 8, 3)):
        log = MetricLog(tmp_path, resumed_at, tensorboard=False)
        for step in range(first, last + 1):
            log.row(step, step * 10, {"loss": float(first)})
        log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["loss"] for row in rows] == [1.0] * 3 + [4.0] * 5


def test_a_new_start_drops_the_rows_before_its_first_step_too(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricLog(tmp_path, -1, tensorboard=False)
        for step in (0, 1):
            log.row(step, step, {"loss": 1.0})
        log.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [0, 1]


def test_tensorboard_holds_histograms(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricLog(tmp_path, -1, tensorboard=True)
    log.histograms(0, {"horizon": torch.tensor([1.0, 10.0, 1000.0], dtype=torch.float64)})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Histograms("horizon")
    assert [(e.step, e.histogram_value.num, e.histogram_value.max) for e in events] == [
        (0, 3, 1000.0)
    ]


def test_tensorboard_holds_the_same_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricLog(tmp_path, 0, tensorboard=True)
    for step in (1, 2):
        log.row(step, step, {"loss": 2.0 * step})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 4.0)]


def test_bits_per_byte_of_a_uniform_byte_model_is_eight() -> None:
    assert bits_per_byte(math.log(256), bytes_per_token=1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), bytes_per_token=4.0) == pytest.approx(2.0)


def test_mfu_counts_flops_per_rank_against_the_peak_of_a_known_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "mfu" not in speed(1e6, 8, 2e9, torch.device("cpu"))
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 989.4e12)
    values = speed(1e6, 8, 2e9, torch.device("cpu"))
    assert values["tokens_per_second_per_rank"] == 125_000
    assert values["tflops_per_rank"] == pytest.approx(250)
    assert values["mfu"] == pytest.approx(250 / 989.4)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_belongs_to_the_very_device(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_console_line_names_everything_and_prints_mfu_only_where_the_peak_is_known() -> None:
    values = {
        "loss": 2.5,
        "bits_per_byte": 1.2,
        "grad_norm": 0.7,
        "lr": 3e-3,
        "tokens_per_second": 123456.0,
        "memory_gib": 1.5,
        "data_fraction": 0.013,
        "eta_seconds": 3725.0,
        "skipped_steps": 0.0,
    }
    line = console_line(10, 200, 81920, values)
    words = ["step", "tokens", "loss", "bpb", "gnorm", "lr", "tok/s", "mem", "data", "eta"]
    assert all(f"{word} " in line for word in words)
    assert "mfu" not in line
    assert "skipped" not in line
    line = console_line(10, 200, 81920, {**values, "mfu": 0.412, "skipped_steps": 2.0})
    assert "mfu 41.2%" in line
    assert line.endswith("skipped 2")


def test_numbers_for_people() -> None:
    assert [short(n) for n in (12, 1234567, 4.2e9)] == ["12", "1.23M", "4.2B"]
    assert [duration(s) for s in (59.6, 61, 3725)] == ["1m00s", "1m01s", "1h02m"]


def test_console_line_of_a_denoising_objective_has_its_two_losses_and_no_bits_per_byte() -> None:
    values = dict.fromkeys(
        ("grad_norm", "lr", "tokens_per_second", "memory_gib", "data_fraction", "eta_seconds"), 1.0
    )
    values |= {"skipped_steps": 0.0, "loss": 3.0, "loss/other": 4.0, "loss/sentinel": 0.5}
    line = console_line(1, 2, 10, values)
    assert "loss 3.0000  sentinel 0.5000  other 4.0000  gnorm" in line
    assert metrics.bits_per_byte_of(3.0, None) == {}


def test_nothing_has_no_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.dist, "all_reduce", lambda x: x.mul_(2))  # of two equal ranks
    sums = {"some": torch.tensor([3.0, 2.0]), "none": torch.zeros(2)}
    assert metrics.means_over_ranks(sums) == {"some": 1.5}
