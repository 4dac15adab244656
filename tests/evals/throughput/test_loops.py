"""What is timed is a training step, of our models and of peers."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from evals.throughput import candidates, worker
from evals.throughput.clock import MAX_STEPS, MIN_STEPS, WARM_UP, StepClock
from evals.throughput.loops import CheckFailed, check_first_step, random_tokens
from evals.throughput.peer_models import mean_visible
from evals.throughput.peers import Peer
from pretrain.config import load_config
from pretrain.models import LanguageModel
from pretrain.training.compiled_blocks import compile_blocks
from pretrain.training.optim import schedule_factor
from pretrain.training.precision import autocast
from tests.evals.throughput.tiny import measurement


@pytest.mark.parametrize("precision", ["bf16", "bf16_weights", "fp32"])
def test_llama_takes_steps_of_every_precision(tmp_path: Path, precision: str) -> None:
    result = worker.measure(asdict(measurement(tmp_path, model="llama", precision=precision)))
    assert result["status"] == "ok"
    assert MIN_STEPS <= len(result["step_seconds"]) <= MAX_STEPS


def test_the_trainer_trains_at_the_rate_of_a_bare_loop(tmp_path: Path) -> None:
    """Which is the optimizer's from the first step on."""
    config = measurement(tmp_path).config()
    total = config.train.total_tokens
    assert {schedule_factor(at, total, config.schedule) for at in (0, 1, 64, total)} == {1.0}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_compiles_no_block_that_was_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    m = measurement(tmp_path, compile=True, checkpointing=checkpointing)
    config, compiled = m.config(), []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(candidates, "compile_blocks", lambda model: compile_blocks(model, backend))
    torch._dynamo.reset()
    model = candidates.LongspanModel(m, config, torch.device("cpu"))
    with autocast(config, model.device):
        model.compile()
        checked = len(compiled)
        for tokens in random_tokens(m, model.device)[:2]:
            model.loss(tokens).backward()
    assert len(compiled) == checked + 1  # the norm behind the blocks


def test_recomputing_blocks_leaves_flops_and_parameters_as_they_are(tmp_path: Path) -> None:
    for model in ({}, {"model": "llama"}):
        runs = [
            worker.measure(asdict(measurement(tmp_path, checkpointing=checkpointing, **model)))
            for checkpointing in (False, True)
        ]
        assert [run["status"] for run in runs] == ["ok", "ok"]
        assert runs[0]["train_flops"] == runs[1]["train_flops"]
        assert runs[0]["parameters"] == runs[1]["parameters"]


def test_a_peer_that_cannot_run_here_says_why(tmp_path: Path) -> None:
    result = worker.measure(asdict(measurement(tmp_path, model="llama_cudnn")))
    assert result == {"status": "cannot be imported: cuDNN's attention needs a GPU"}


def test_llama_costs_what_our_transformer_of_its_size_costs(tmp_path: Path) -> None:
    m = measurement(tmp_path, model="llama")
    ours = load_config(
        [
            "model=attention_tiny",
            "model.vocab_size=64",
            "model.d_model=32",
            "model.n_layers=2",
            "model.d_ff=128",
            "model.mixers.attention.n_heads=2",
        ]
    )
    model = LanguageModel(ours.model)
    peer = Peer(m, m.config(), torch.device("cpu"))
    assert peer.train_flops == 3 * sum(model.flops_per_token(m.length).values())


@pytest.mark.parametrize("length", [1, 5, 9])
def test_mean_visible_is_the_mean_over_positions(length: int) -> None:
    counts = [min(position + 1, 5) for position in range(length)]
    assert mean_visible(length, 5) == pytest.approx(sum(counts) / length)


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (3.0, 1.0), (6.0, 1.0), (4.2, math.inf), (4.2, 0.0)]
)
def test_a_first_step_that_is_no_guess_is_refused(loss: float, norm: float) -> None:
    check_first_step(4.2, 1.0, 64)
    with pytest.raises(CheckFailed):
        check_first_step(loss, norm, 64)


def test_the_check_comes_before_the_second_batch() -> None:
    clock, events = StepClock(torch.device("cpu"), 0.01, lambda text: None), []

    def check() -> None:
        events.append("check")

    for batch in clock.steps(["a", "b"], check):
        events.append(batch)
    assert events[:4] == ["a", "check", "a", "b"]
    assert len(events) == 2 + WARM_UP + len(clock.step_seconds)
    assert min(clock.step_seconds) > 0
