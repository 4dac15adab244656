"""Pads change nothing, what nothing reads stays as it was, and a label that can be learned is."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.tokenizer import BOS_ID, EOS_ID
from pretrain.finetuning.classifier import EncoderClassifier, LastTokenClassifier
from pretrain.finetuning.interface import Pairs
from pretrain.finetuning.train import TrainOptions, train
from pretrain.models import (
    EncoderDecoder,
    EncoderStackConfig,
    LanguageModel,
    LanguageModelConfig,
    LayersConfig,
)
from tests.pretrain.finetuning.models import MIXERS, VOCAB, language_model

# fp32 sums in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SPADE = {"n_heads": 2, "window_size": 8, "n_modes": 3, "chunk_size": 8}
CLASSES = 3


def with_encoder(mixer="swa", *, tied=True):
    torch.manual_seed(0)
    options = {name: MIXERS.get(name, SPADE) for name in {mixer, "spade"}}
    layers = LayersConfig(default=mixer, at={0: "spade"})
    config = LanguageModelConfig(
        vocab_size=VOCAB,
        d_model=16,
        n_layers=1,
        layers=LayersConfig(default="attention"),
        mixers={"attention": MIXERS["attention"]},
        d_ff=32,
        init_std=0.3,
        tie_embeddings=tied,
        encoder=EncoderStackConfig(2, layers, options),
        cross_attention={"n_heads": 2},
    )
    return EncoderClassifier(EncoderDecoder(config), CLASSES)


def without(*mixers, **changes):
    return LastTokenClassifier(language_model(*mixers, **changes), CLASSES, BOS_ID)


MODELS = {
    "encoder": with_encoder,
    "encoder longvq": lambda: with_encoder("longvq"),
    "bst, swa": lambda: without("bst", "swa"),
    "longvq": lambda: without("longvq"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def pairs(lengths=(5, 0, 21, 12)):
    rng = np.random.default_rng(0)
    inputs = [rng.integers(4, VOCAB, n) for n in lengths]
    return Pairs(inputs, [np.array([n % CLASSES]) for n in lengths])


def logits_of(classifier, one):
    """(1, C), without pads and mask."""
    if isinstance(classifier, EncoderClassifier):
        hidden = classifier.model.encode(torch.tensor([[*one, EOS_ID]]))[0].mean(1)
    else:
        hidden = classifier.model(torch.tensor([[BOS_ID, *one, EOS_ID]])).hidden[:, -1]
    return classifier.head(hidden)


@every_model
def test_the_loss_and_the_answer_are_those_of_each_input_alone(name):
    classifier, batch = MODELS[name](), pairs()
    classifier.module.eval()
    logits = torch.cat([logits_of(classifier, one) for one in batch.inputs])
    wanted = torch.tensor(np.concatenate(batch.targets))
    loss = classifier.loss(batch)
    expected = F.cross_entropy(logits, wanted, reduction="sum")
    torch.testing.assert_close(loss.loss_sum, expected, **TOLERANCE)
    assert classifier.n_targets(batch) == 4
    read = 1 if isinstance(classifier, EncoderClassifier) else 2
    assert loss.n_tokens == 5 + 0 + 21 + 12 + 4 * read
    for tokens in (1, 40, 1000):
        assert classifier.classify(batch.inputs, tokens) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", ["encoder longvq", "longvq"])
def test_what_mixers_learn_beside_the_loss_is_of_no_pads(name):
    classifier, batch = MODELS[name](), pairs()
    classifier.module.train()
    together = classifier.loss(batch).aux
    alone = [classifier.loss(batch.take([row])).aux for row in range(4)]
    assert together
    for key, value in together.items():
        torch.testing.assert_close(value, sum(aux[key] for aux in alone), **TOLERANCE)


def untied():
    language = language_model("swa")
    config = language.config
    config.tie_embeddings = False
    return LastTokenClassifier(LanguageModel(config), CLASSES, BOS_ID)


@pytest.mark.parametrize(
    ("build", "frozen"),
    [
        (with_encoder, {"decoder_blocks", "norm"}),
        (lambda: with_encoder(tied=False), {"decoder_blocks", "norm", "head"}),
        (lambda: without("swa"), set()),
        (untied, {"head"}),
    ],
)
def test_what_the_head_does_not_read_is_frozen_and_all_else_is_learned(build, frozen):
    classifier = build()
    classifier.loss(pairs()).loss_sum.backward()
    for name, parameter in classifier.module.named_parameters():
        whose, part = name.split(".")[:2]
        assert parameter.requires_grad != (whose == "model" and part in frozen), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("name", ["encoder", "bst, swa"])
def test_a_planted_label_is_learned_without_a_mistake(name, tmp_path):
    """Which of three tokens stands among noise of any length?"""
    classifier, rng = MODELS[name](), np.random.default_rng(0)

    def planted(n):
        labels = rng.integers(CLASSES, size=n)
        texts = [rng.integers(10, 14, rng.integers(0, 12)) for _ in range(n)]
        inputs = [
            np.insert(text, rng.integers(len(text) + 1), 20 + label)
            for text, label in zip(texts, labels, strict=True)
        ]
        return Pairs(inputs, list(labels[:, None]))

    def accuracy(pairs):
        found = classifier.classify(pairs.inputs, 1000)
        return float(np.mean(found == np.concatenate(pairs.targets)))

    validation, test = planted(60), planted(200)
    options = TrainOptions(steps=60, batch_size=16, check_every=20, learning_rate=1e-2)
    train(classifier, planted(200), lambda: accuracy(validation), options, 0, tmp_path / "p.pt")
    assert accuracy(test) == 1


@every_model
def test_autocast_changes_rounding_only_and_leaves_the_loss_wide(name):
    classifier, batch = MODELS[name](), pairs()
    classifier.module.eval()
    exact = classifier.loss(batch).loss_sum
    classifier.autocast = True
    narrow = classifier.loss(batch).loss_sum
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, exact, rtol=0.05, atol=0.05)
    narrow.backward()
    assert torch.isfinite(classifier.head.weight.grad).all()


@pytest.mark.parametrize("bound", [32, 40])  # of 40, which padding never meets, 32 are left
def test_the_longest_input_is_what_the_layers_take(bound):
    options = {"bst": MIXERS["bst"] | {"filters": "unstructured", "train_length": bound}}
    bounded = without("bst", options=options)
    assert bounded.longest_input() == 30
    assert len(bounded.classify(pairs(lengths=(30, 3)).inputs, 1000)) == 2
    with pytest.raises(ValueError, match=str(bound)):
        bounded.classify(pairs(lengths=(31,)).inputs, 1000)
    assert without("swa").longest_input() == with_encoder().longest_input() == 0
