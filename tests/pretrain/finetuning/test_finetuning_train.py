"""Fine-tuning learns what can be learned, keeps the best weights, and survives a kill."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.tokenizer import BOS_ID
from pretrain.finetuning.generation import GenerationOptions, generate
from pretrain.finetuning.interface import Pairs
from pretrain.finetuning.prompted import prompted
from pretrain.finetuning.train import TrainOptions, train
from tests.pretrain.finetuning.models import language_model

OPTIONS = TrainOptions(steps=12, batch_size=4, check_every=4, learning_rate=1e-2)


def last_token(n, seed):
    """Which token ends the input? Noise of any length stands before it."""
    rng = np.random.default_rng(seed)
    inputs = [rng.integers(10, 14, rng.integers(1, 12)) for _ in range(n)]
    return Pairs(inputs, [one[-1:] for one in inputs])


def small():
    return prompted(language_model("swa"), BOS_ID)


def accuracy(model, pairs):
    written = generate(model, pairs.inputs, GenerationOptions(2))
    return np.mean([list(a) == list(b) for a, b in zip(written, pairs.targets, strict=True)])


def test_a_small_model_learns_to_answer(tmp_path):
    model, held_out = small(), last_token(60, 1)
    options = replace(OPTIONS, steps=90, check_every=30, batch_size=16)
    result = train(
        model, last_token(200, 0), lambda: accuracy(model, held_out), options, 0, tmp_path / "p.pt"
    )
    assert result["validation"] > 0.9
    assert accuracy(model, last_token(60, 2)) > 0.9


def scripted(scores):
    scores = iter(scores)
    return lambda: next(scores)


def test_training_stops_when_validation_does_not_improve_and_keeps_the_best(tmp_path):
    model, looks = small(), []

    def look():
        looks.append({k: v.clone() for k, v in model.module.state_dict().items()})
        return [1.0, 3.0, 2.0, 3.0, 1.0, 9.0][len(looks) - 1]

    options = replace(OPTIONS, steps=60, check_every=2)
    result = train(model, last_token(40, 0), look, options, 0, tmp_path / "p.pt")
    assert (result["steps"], result["step"], result["validation"]) == (10, 4, 3.0)
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, looks[1][name])


def test_a_killed_training_ends_like_one_that_was_not(tmp_path):
    scores = [1.0, 3.0, 2.0, 2.5, 2.6]
    options = replace(OPTIONS, steps=40)

    def go(name, validate):
        model = small()
        result = train(model, last_token(40, 0), validate, options, 0, tmp_path / name)
        timing = {"seconds", "tokens"}
        return {k: v for k, v in result.items() if k not in timing}, model.module.state_dict()

    whole, weights = go("whole.pt", scripted(scores))

    def killed():
        killed.calls += 1
        if killed.calls == 4:  # one look after the best
            raise KeyboardInterrupt
        return scores[killed.calls - 1]

    killed.calls = 0
    with pytest.raises(KeyboardInterrupt):
        go("killed.pt", killed)
    result, resumed = go("killed.pt", scripted(scores[3:]))
    assert result == whole
    for name, value in resumed.items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("mixer", ["swa", "longvq"])
def test_micro_batches_change_rounding_only(mixer, tmp_path):
    def weights(tokens):
        model = prompted(language_model(mixer), BOS_ID)
        options = replace(OPTIONS, steps=3, batch_size=8, micro_batch_tokens=tokens)
        result = train(model, last_token(40, 0), lambda: 0.0, options, 0, tmp_path / f"{tokens}.pt")
        return model.module.state_dict(), result["history"][-1]["loss"]

    (whole, loss), (parts, loss_of_parts) = weights(10**6), weights(20)
    assert loss == pytest.approx(loss_of_parts, rel=1e-4)
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=1e-3, atol=1e-4)


def test_divergence_ends_a_training_and_is_reported(tmp_path):
    options = replace(OPTIONS, learning_rate=1e30)
    result = train(small(), last_token(40, 0), lambda: 0.0, options, 0, tmp_path / "p.pt")
    assert result["diverged"]
    assert result["steps"] < OPTIONS.steps
