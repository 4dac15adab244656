"""Models that claim a constant state keep it to the byte, and one that lies is found out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evals import streaming
from evals.streaming import Measurement
from launch import evaluate
from pretrain import mixers
from pretrain.config import load_config
from pretrain.mixers.attention import Attention
from pretrain.models import LanguageModel

TINY = streaming.tiny_models()
SEGMENT = 128

HONEST = Measurement(
    name="honest",
    parameters=1,
    constant_state=True,
    contexts=[32, 64],
    state_bytes=[8, 8],
    live_bytes=[80, 80],
    seconds_per_token=[0.01, 0.012],
    ratio=1.2,
    ratio_ci95=(0.9, 1.5),
    lengths=[32, 64],
    training_seconds_per_token=[0.1, 0.1],
    exponent=1.0,
    exponent_range=(0.9, 1.2),
)


@pytest.mark.parametrize("name", TINY)
def test_state_and_live_bytes_are_constant_where_claimed(name: str) -> None:
    config = replace(load_config([f"model={name}"]).model, vocab_size=streaming.VOCABULARY)
    model = LanguageModel(config)
    segment = streaming.random_tokens(SEGMENT)
    with torch.inference_mode():
        states = streaming.read(model, [SEGMENT, 3 * SEGMENT], SEGMENT)
        held = [streaming.held_bytes(state) for state in states]
        live = [streaming.peak_bytes(model, segment, state) for state in states]
    assert (held[0] == held[1]) == (live[0] == live[1]) == model.constant_state
    assert 0 < held[0] < live[0]


class Liar(Attention):
    """Full attention that claims a constant state."""

    constant_state = True


def test_a_false_claim_of_a_constant_state_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(mixers.MIXERS, "liar", Liar)
    config = tmp_path / "liar.yaml"
    config.write_text("model: {d_model: 16, n_layers: 1, layers: {default: liar}, d_ff: 8}")
    sizes = "contexts=32,64 lengths=8,16 segment_tokens=32 rounds=6 training_rounds=1"
    words = ["streaming", f"models={config}", f"out={tmp_path}", *sizes.split()]
    assert evaluate.main(words) == evaluate.GROWS
    (row,) = json.loads((tmp_path / "streaming.json").read_text())["models"]
    assert not row["passed"]
    # Keys and values of 16 numbers each, and the position.
    assert row["state_bytes"] == [4 * 2 * 16 * 32 + 8, 4 * 2 * 16 * 64 + 8]
    assert row["verdict"].startswith("FAILED, grows: state bytes, live bytes")
    assert (tmp_path / "streaming.md").read_text() in capsys.readouterr().out
    assert len((tmp_path / "streaming.csv").read_text().splitlines()) == 5
    assert (tmp_path / "streaming.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "constant"),  # 1.2 times as slow, which the noise explains
        ({"ratio_ci95": (1.15, 1.5)}, "FAILED, grows: time per token"),
        ({"live_bytes": [80, 81]}, "FAILED, grows: live bytes"),
        ({"exponent_range": (1.8, 2.0)}, "FAILED, grows: training time per token"),
        ({"state_bytes": [8, 9], "constant_state": False}, "grows: state bytes"),
    ],
)
def test_verdict_names_what_grows(changes: dict[str, object], verdict: str) -> None:
    measured = replace(HONEST, **changes)
    assert measured.verdict() == verdict
    assert measured.passed != verdict.startswith("FAILED")


def test_the_interval_holds_the_median_whatever_the_noise() -> None:
    draws = np.random.default_rng(0).exponential(size=(2000, 15))
    inside = [low <= np.log(2) <= high for low, high in map(streaming.median_ci95, draws)]
    assert 0.95 < np.mean(inside) < 0.98  # 0.965 by the binomial distribution


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("models=swa_tiny", "out= is missing"),
        ("out=x models=swa_tny", "did you mean 'swa_tiny'"),
        ("out=x models=t5_tiny", "models=t5_tiny: an encoder reads all of its input at once"),
        ("out=x contexts=2048,3000", "a multiple of segment_tokens=2048"),
        ("out=x contexts=4096,2048", "at least two, rising"),
        ("out=x growing_tokens=2048", "choose at least 4096"),
        ("out=x rounds=5", "needs at least 6"),
        ("out=x training_rounds=0", "must be at least 1"),
    ],
)
def test_bad_options_are_refused_with_the_reason(
    words: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["streaming", *words.split()]) == evaluate.BAD_INPUT
    assert reason in capsys.readouterr().err
