"""The table says what the results say."""

from typing import Any

import pytest

from evals.throughput import report


def result(loop: str, seconds: list[float], status: str = "ok", batch_size: int = 2) -> Any:
    """Of a model of 1 MFLOP per token, 1,000 tokens per sequence."""
    settings = {"model": "m", "loop": loop, "precision": "bf16", "checkpointing": False}
    settings["residual_in_fp32"] = True
    return {
        "status": status,
        "name": "m",
        "settings": settings | {"length": 1000, "batch_size": batch_size},
        "machine": {"device": "NVIDIA H100 80GB HBM3"},
        "step_seconds": seconds,
        "train_flops": 1e6,
        "parameters": 10,
        "memory_gib": 1.0,
        "ready_seconds": 2.0,
    }


def test_rates_follow_from_the_median_step() -> None:
    row = report.row_of(result("plain", [0.1, 0.2, 5.0]))
    assert row["ms"] == pytest.approx(200)
    assert row["tokens_per_second"] == pytest.approx(10_000)
    assert row["tflops"] == pytest.approx(0.01)
    assert row["mfu"] == pytest.approx(1e10 / 989.4e12)


def test_a_row_is_said_in_brief() -> None:
    assert report.brief(report.row_of(result("plain", [0.1, 0.2, 0.3]))) == (
        "200.0 [150.0, 250.0] ms, 10,000 tokens/s, MFU 0.0%, 1.0 GiB"
    )
    assert report.brief(report.row_of(result("plain", [], "out of memory"))) == "out of memory"


def test_the_share_of_a_loop_is_that_of_means() -> None:
    rows = [report.row_of(result("deepspeed", [1.0, 1.0])), report.row_of(result("plain", [0.8]))]
    rows.append(report.row_of(result("trainer", [1.0, 1.0, 1.0, 1.4])))
    text = " ".join(report.sentences(rows))
    assert "DeepSpeed adds +25.0% to the plain loop" in text
    assert "the trainer adds +10.0% to the deepspeed loop" in text


def test_memory_per_token_is_said_of_several_micro_batches_and_speed_of_several_lengths() -> None:
    results = [result("plain", [1.0], batch_size=1), result("plain", [1.5], batch_size=5)]
    results[1]["memory_gib"] = 1.5
    longer = result("plain", [6.0], batch_size=1)
    longer["settings"]["length"] = 5000
    first, second = report.sentences([report.row_of(r) for r in (*results, longer)])
    # 2^19 KiB by 4,000 tokens.
    assert first == (
        "m, plain: 131.1 KiB of peak memory per token between micro-batches of 1,000 and 5,000"
    )
    assert second == "m, plain: 0.25 at 5,000 of 1,000's speed"  # of the faster micro-batch


def test_the_best_micro_batch_is_shown_and_memory_where_there_is_none() -> None:
    rows = [
        report.row_of(result("plain", [1.0], batch_size=1)),
        report.row_of(result("plain", [1.5], batch_size=2)),
        report.row_of(result("plain", [], "out of memory", batch_size=4)),
    ]
    assert [row["batch_size"] for row in report.best(rows)] == [2]
    assert "| out of memory |" in report.markdown(report.best(rows[2:]))
