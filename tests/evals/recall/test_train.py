"""Scoring is right at both ends, training finds a short flag, and windows cannot find a far one."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evals.recall.jobs import Experiment
from evals.recall.rows import ROWS, Memory
from evals.recall.tasks import FlagRecall, MultiQueryRecall
from evals.recall.train import TrainOptions, run, score, state_floats
from evals.stats import wilson
from evals.trainings import search
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig

TASK = FlagRecall(seq_len=24, min_distance=16)


class FlagReader(torch.nn.Module):
    """Answers with the document's first token, which it carries as its state; or with a guess."""

    def __init__(self, *, guess: bool = False) -> None:
        super().__init__()
        self.guess = guess
        self.embedding = torch.nn.Embedding(1, 1)  # tells where it runs
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, tokens, state=None):
        flag = tokens[:, :1] if state is None else state
        if self.guess:
            answer = torch.randint(TASK.n_flags, tokens.shape, generator=self.generator)
        else:
            answer = flag.expand_as(tokens)
        return SimpleNamespace(hidden=F.one_hot(answer, TASK.vocab_size).float(), state=flag)

    def logits(self, hidden):
        return hidden


@pytest.mark.parametrize("segment_tokens", [0, 5])
def test_reading_the_flag_scores_all_and_guessing_scores_chance(segment_tokens):
    examples = TASK.sample(np.random.default_rng(0), 1000)
    assert score(FlagReader(), examples, segment_tokens).all()
    right = score(FlagReader(guess=True), examples, segment_tokens)
    assert len(right) == 1000
    low, high = wilson(right.sum(), 1000)
    assert low <= TASK.chance <= high


def test_a_state_that_is_not_carried_is_found_out():
    class Forgetful(FlagReader):
        def forward(self, tokens, state=None):
            return super().forward(tokens, None)

    examples = TASK.sample(np.random.default_rng(0), 200)
    assert score(Forgetful(), examples).all()
    assert not score(Forgetful(), examples, 5).any()


@pytest.mark.parametrize("row", ROWS)
def test_every_model_of_the_table_streams_as_it_reads_whole_and_states_its_size(row):
    torch.manual_seed(0)
    task = FlagRecall(seq_len=80, min_distance=64)
    model = LanguageModel(ROWS[row].config(task.vocab_size))
    model.eval()
    tokens = torch.from_numpy(task.sample(np.random.default_rng(0), 2).tokens)
    whole, state, parts = model(tokens).hidden, None, []
    for segment in tokens.split(24, dim=1):
        output = model(segment, state)
        parts.append(output.hidden)
        state = output.state
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
    grown = state_floats(model, 128)[0] > state_floats(model, 64)[0]
    assert grown == (ROWS[row].memory is Memory.GROWING)
    assert model.constant_state != grown


def test_state_size_of_a_window_is_its_keys_and_values():
    torch.manual_seed(0)
    assert state_floats(LanguageModel(ROWS["swa"].config(32)), 64) == [2 * 16 * 64] * 2


def small_s4d(vocab_size: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        vocab_size=vocab_size,
        d_model=16,
        n_layers=1,
        layers=LayersConfig(pattern=["s4d"]),
        mixers={"s4d": {"n_modes": 4, "chunk_size": 8}},
        d_ff=32,
    )


def test_a_small_state_space_model_learns_a_short_flag():
    task = FlagRecall(seq_len=8, min_distance=4, n_flags=4, n_noise=2)
    options = TrainOptions(
        steps=300,
        check_every=100,
        solved=0.9,
        validation_examples=200,
        test_examples=200,
        test_lengths=(2, 16),
    )
    result = run(small_s4d(task.vocab_size), task, 1e-2, 0, options, torch.device("cpu"))
    low, _ = wilson(result["tests"]["whole"]["correct"], 200)
    assert low > task.chance
    assert result["tests"]["stream"] == result["tests"]["whole"]
    sizes = {name: (test["tokens"], test["documents"]) for name, test in result["tests"].items()}
    assert sizes == {"whole": (8, 200), "stream": (8, 200), "2x": (16, 200), "16x": (128, 50)}
    assert result["history"][-1]["validation"] == result["validation"]


def test_the_same_seed_gives_the_same_training():
    task = MultiQueryRecall(seq_len=16, n_pairs=2, vocab_size=16)
    options = TrainOptions(
        steps=5, check_every=5, validation_examples=20, test_examples=20, batch_size=4
    )
    config = small_s4d(task.vocab_size)
    first, second, other = (
        run(config, task, 1e-2, seed, options, torch.device("cpu")) for seed in (0, 0, 1)
    )
    assert first["history"] == second["history"] != other["history"]
    assert first["tests"]["whole"]["answers"] == 40


def test_divergence_ends_a_training_and_is_reported():
    task = FlagRecall(seq_len=8, min_distance=4)
    options = TrainOptions(
        steps=50, check_every=5, validation_examples=20, test_examples=20, batch_size=4
    )
    result = run(small_s4d(task.vocab_size), task, 1e30, 0, options, torch.device("cpu"))
    assert result["diverged"]
    json.dumps(result, allow_nan=False)
    assert result["steps"] == 5
    assert not result["solved"]


@pytest.mark.slow
def test_a_window_stays_at_chance_where_a_moving_average_finds_the_flag(tmp_path):
    task = FlagRecall(seq_len=120, min_distance=64)
    accuracy = {}
    for row, steps in (("swa", 300), ("ema", 800)):
        options = TrainOptions(steps=steps, batch_size=32)
        experiment = Experiment(task, (row,), (0,), (1e-2,), options, "cpu")
        (result,) = search(experiment, row, 0, tmp_path)
        accuracy[row] = result["tests"]["stream"]
    low, high = wilson(accuracy["swa"]["correct"], accuracy["swa"]["documents"])
    assert low <= task.chance <= high
    assert accuracy["ema"]["correct"] >= 0.95 * accuracy["ema"]["answers"]
