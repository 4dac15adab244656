"""Training learns what can be learned, picks weights on validation, and survives a kill."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evals.lra import train
from evals.lra.examples import Examples
from evals.lra.rows import ROWS
from evals.lra.tasks import TASKS
from evals.lra.train import TrainOptions, run, score
from pretrain import mixers
from pretrain.models import Encoder, EncoderConfig, LayersConfig

OPTIONS = TrainOptions(steps=12, batch_size=4, check_every=4)


def config(**changes) -> EncoderConfig:
    values = {
        "n_classes": 2,
        "vocab_size": 4,
        "d_model": 8,
        "n_layers": 1,
        "layers": LayersConfig(default="s4d"),
        "mixers": {"s4d": {"n_modes": 3, "chunk_size": 8}},
        "d_ff": 16,
    }
    return EncoderConfig(**(values | changes))


def first_symbol(n: int, seed: int, per_example: int = 1) -> Examples:
    """Which of two symbols begins the (last) sequence? The rest is noise of any length."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 30, size=n * per_example)
    rows = [rng.integers(2, 4, size=size, dtype=np.uint8) for size in lengths]
    labels = rng.integers(2, size=n)
    for row, label in zip(rows[per_example - 1 :: per_example], labels, strict=True):
        row[0] = label
    return Examples.of([row.tobytes() for row in rows], labels)


def splits(per_example: int = 1) -> dict[str, Examples]:
    sizes = {"train": 64, "validation": 80, "test": 100}
    return {name: first_symbol(n, n, per_example) for name, n in sizes.items()}


def untimed(result: dict) -> dict:
    return {key: value for key, value in result.items() if not key.startswith("seconds")}


def test_rows_are_all_two_sided_mixers_and_of_one_size():
    assert sorted(ROWS) == mixers.names(causal=False)
    with torch.device("meta"):
        models = {row: Encoder(ROWS[row].config(TASKS["listops"])) for row in ROWS}
    sizes = {row: sum(p.numel() for p in model.parameters()) for row, model in models.items()}
    for row, size in sizes.items():
        assert abs(size / sizes["swa"] - 1) < 0.01, row


@pytest.mark.parametrize("n_inputs", [1, 2])
def test_a_small_encoder_learns_and_is_tested_on_unseen_examples(n_inputs, tmp_path):
    options = TrainOptions(steps=150, batch_size=16, check_every=50)
    result = run(
        config(n_inputs=n_inputs),
        splits(n_inputs),
        1e-2,
        0,
        options,
        torch.device("cpu"),
        tmp_path / "progress.pt",
    )
    assert result["test"] > 0.9
    assert result["validation"] == max(check["validation"] for check in result["history"])
    assert not result["diverged"]


def test_the_weights_that_were_best_on_validation_are_tested(tmp_path, monkeypatch):
    asked = []

    def fake(model, examples, options, row_lengths):
        asked.append((len(examples.labels), model.head.bias.detach().clone()))
        return {80: [0.3, 0.6, 0.5], 100: [0.4]}[len(examples.labels)][
            sum(size == len(examples.labels) for size, _ in asked) - 1
        ]

    monkeypatch.setattr(train, "score", fake)
    result = run(config(), splits(), 1e-2, 0, OPTIONS, torch.device("cpu"), tmp_path / "p.pt")
    assert (result["validation"], result["step"], result["test"]) == (0.6, 8, 0.4)
    assert [size for size, _ in asked] == [80, 80, 80, 100]  # the test set once
    assert torch.equal(asked[3][1], asked[1][1])
    assert not torch.equal(asked[3][1], asked[2][1])


def test_a_killed_training_ends_like_one_that_was_not(tmp_path, monkeypatch):
    def go(name):
        result = run(config(), splits(), 1e-2, 0, OPTIONS, torch.device("cpu"), tmp_path / name)
        return untimed(result)

    whole = go("whole.pt")
    true_score, calls = score, []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true_score(*arguments, **options)

    monkeypatch.setattr(train, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        go("killed.pt")
    calls += [1]
    assert go("killed.pt") == whole


def test_scoring_counts_every_example_once():
    class Reader(torch.nn.Module):
        """Knows the answer: the first symbol."""

        def __init__(self):
            super().__init__()
            self.config = config()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs, lengths):
            assert (lengths <= inputs.shape[1]).all()
            return SimpleNamespace(logits=torch.nn.functional.one_hot(inputs[:, 0], 4).float())

    examples = first_symbol(150, 0)
    options, row_lengths = TrainOptions(steps=1, batch_size=64), [15, 30]
    assert score(Reader(), examples, options, row_lengths) == 1.0
    wrong = Examples(examples.symbols, examples.offsets, examples.labels.copy())
    wrong.labels[:30] = 1 - wrong.labels[:30]
    assert score(Reader(), wrong, options, row_lengths) == pytest.approx(0.8)


def test_divergence_ends_a_training_and_is_reported(tmp_path):
    result = run(config(), splits(), 1e30, 0, OPTIONS, torch.device("cpu"), tmp_path / "p.pt")
    assert result["diverged"]
    json.dumps(result, allow_nan=False)
    assert len(result["history"]) < 3
