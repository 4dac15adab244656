"""The prompt's loss is that of the whole text; writing from a state equals reading all again."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.tokenizer import BOS_ID, EOS_ID
from pretrain.finetuning.generation import GenerationOptions, generate
from pretrain.finetuning.interface import Pairs
from pretrain.finetuning.prompted import (
    PromptedLanguageModel,
    RereadingLanguageModel,
    prompted,
)
from pretrain.mixers.base import map_state
from tests.pretrain.finetuning.models import MIXERS, VOCAB, language_model

# fp32 sums in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def pairs(seed=0, lengths=((5, 2), (0, 3), (21, 1), (12, 0))):
    rng = np.random.default_rng(seed)
    texts = [[rng.integers(4, VOCAB, n) for n in pair] for pair in lengths]
    return Pairs([one for one, _ in texts], [other for _, other in texts])


def test_the_loss_is_of_the_target_and_its_eos_alone():
    model = language_model("bst", "swa")
    batch = pairs()
    expected = torch.zeros(())
    for one, other in zip(*batch, strict=True):
        text = torch.tensor([[BOS_ID, *one, EOS_ID, *other, EOS_ID]])
        log_probs = model.logits(model(text[:, :-1]).hidden).log_softmax(-1)
        nll = F.nll_loss(log_probs[0], text[0, 1:], reduction="none")
        expected = expected + nll[-len(other) - 1 :].sum()
    loss = prompted(model, BOS_ID).loss(batch)
    torch.testing.assert_close(loss.loss_sum, expected, **TOLERANCE)
    assert prompted(model, BOS_ID).n_targets(batch) == 2 + 3 + 1 + 0 + 4
    assert loss.n_tokens == sum(len(a) + len(b) + 2 for a, b in zip(*batch, strict=True))


def test_gradients_do_not_depend_on_what_stands_beside():
    model = language_model("bst", "swa")
    batch = pairs()
    prompted(model, BOS_ID).loss(batch).loss_sum.backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row in range(4):
        prompted(model, BOS_ID).loss(batch.take([row])).loss_sum.backward()
    for one, other in zip(together, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, **TOLERANCE)


def test_what_mixers_learn_beside_the_loss_is_of_no_pads():
    model = prompted(language_model("longvq"), BOS_ID)
    model.module.train()
    batch = pairs()
    together = model.loss(batch).aux
    alone = [model.loss(batch.take([row])).aux for row in range(4)]
    assert together
    for name, value in together.items():
        torch.testing.assert_close(value, sum(aux[name] for aux in alone), **TOLERANCE)


@pytest.mark.parametrize(
    ("mixer", "beams"), [("bst", 1), ("bst", 3), ("attention", 3), ("longvq", 3), ("swa", 1)]
)
def test_writing_from_the_state_equals_reading_everything_again(mixer, beams):
    model = language_model(mixer)
    inputs = pairs(lengths=[(n, 0) for n in (5, 5, 13)]).inputs
    options = GenerationOptions(8, beams=beams)
    carried = generate(PromptedLanguageModel(model, BOS_ID), inputs, options)
    again = generate(RereadingLanguageModel(model, BOS_ID), inputs, options)
    assert [list(text) for text in carried] == [list(text) for text in again]
    assert len({tuple(text) for text in carried}) > 1


@torch.inference_mode()
def test_logits_of_a_step_are_those_of_the_text():
    model = language_model("bst", "attention")
    carried, again = PromptedLanguageModel(model, BOS_ID), RereadingLanguageModel(model, BOS_ID)
    inputs = pairs(lengths=[(13, 0)] * 3).inputs
    states = [carried.start(inputs), again.start(inputs)]
    token = torch.full((3,), EOS_ID)
    for _ in range(10):
        one, states[0] = carried.step(token, states[0])
        other, states[1] = again.step(token, states[1])
        torch.testing.assert_close(one, other, **TOLERANCE)
        token = one.argmax(-1)


@torch.inference_mode()
def test_the_state_does_not_grow_where_the_mixers_do_not():
    model = PromptedLanguageModel(language_model("bst", "swa"), BOS_ID)

    def numbers(length):
        sizes = []
        map_state(lambda t: sizes.append(t.numel()), model.start([np.full(length, 5)]))
        return sum(sizes)

    assert numbers(63) == numbers(255)


def test_a_long_input_is_read_in_parts_with_the_same_result(monkeypatch):
    model = PromptedLanguageModel(language_model("bst", "swa"), BOS_ID)
    inputs = pairs(lengths=[(50, 0)]).inputs
    whole = generate(model, inputs, GenerationOptions(8))
    monkeypatch.setattr("pretrain.finetuning.prompted.PREFILL_TOKENS", 7)
    parts = generate(model, inputs, GenerationOptions(8))
    assert list(whole[0]) == list(parts[0])


@pytest.mark.parametrize("bound", [32, 40])  # of 40, which padding never meets, 32 are left
def test_layers_without_a_state_are_read_again_and_bound_the_input(bound):
    options = {"bst": MIXERS["bst"] | {"filters": "unstructured", "train_length": bound}}
    language = language_model("bst", options=options)
    model = prompted(language, BOS_ID)
    assert isinstance(model, RereadingLanguageModel)
    assert model.longest_input(4) == 32 - 4 - 2
    assert model.longest_input(29) == 1
    with pytest.raises(ValueError, match="targets of 30 tokens leave no room for an input"):
        model.longest_input(30)
    assert prompted(language_model("bst"), BOS_ID).longest_input(4) == 0
    # The longest that is allowed, to the last token of its target.
    longest = pairs(lengths=[(26, 4)])
    assert model.loss(longest).n_tokens == 32
    assert len(generate(model, longest.inputs, GenerationOptions(5))[0]) <= 5
    with pytest.raises(ValueError, match="carries no state"):
        PromptedLanguageModel(language, BOS_ID)
