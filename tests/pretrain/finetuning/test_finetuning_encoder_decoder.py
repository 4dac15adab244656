"""Pads change nothing, and writing from the state equals the decoder's whole forward."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data.tokenizer import EOS_ID, PAD_ID
from pretrain.finetuning.encoder_decoder import PairEncoderDecoder
from pretrain.finetuning.generation import GenerationOptions, generate
from pretrain.finetuning.interface import Pairs
from pretrain.models import (
    EncoderDecoder,
    EncoderStackConfig,
    LanguageModelConfig,
    LayersConfig,
)
from tests.pretrain.finetuning.models import MIXERS, VOCAB

# fp32 sums in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
SPADE = {"n_heads": 2, "window_size": 8, "n_modes": 3, "chunk_size": 8}


def model(decoder="attention"):
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=VOCAB,
        d_model=16,
        n_layers=2,
        layers=LayersConfig(default=decoder),
        mixers={decoder: MIXERS[decoder]},
        d_ff=32,
        init_std=0.3,
        encoder=EncoderStackConfig(
            2,
            LayersConfig(default="swa", at={0: "spade"}),
            {"swa": MIXERS["swa"], "spade": SPADE},
        ),
        cross_attention={"n_heads": 2},
    )
    return EncoderDecoder(config).eval()


def pairs(lengths=((5, 2), (0, 3), (21, 1), (12, 0))):
    rng = np.random.default_rng(0)
    texts = [[rng.integers(4, VOCAB, n) for n in pair] for pair in lengths]
    return Pairs([one for one, _ in texts], [other for _, other in texts])


def logits_of(network, one, written):
    """(T, V), without pads, mask and state."""
    read = torch.tensor([[*one, EOS_ID]])
    hidden = network(torch.tensor([[PAD_ID, *written]]), encoder_tokens=read).hidden
    return network.logits(hidden)[0]


def test_the_loss_is_that_of_each_pair_alone():
    network, batch = model(), pairs()
    expected = torch.zeros(())
    for one, other in zip(*batch, strict=True):
        logits = logits_of(network, one, other)
        wanted = torch.tensor([*other, EOS_ID])
        expected = expected + F.cross_entropy(logits, wanted, reduction="sum")
    wrapped = PairEncoderDecoder(network)
    loss = wrapped.loss(batch)
    torch.testing.assert_close(loss.loss_sum, expected, **TOLERANCE)
    assert wrapped.n_targets(batch) == 2 + 3 + 1 + 0 + 4
    assert loss.n_tokens == 5 + 21 + 12 + 4 + 6 + 4


@torch.inference_mode()
@pytest.mark.parametrize("decoder", ["attention", "bst"])
def test_steps_are_the_whole_forward_for_inputs_of_any_length(decoder):
    network = model(decoder)
    wrapped, inputs = PairEncoderDecoder(network), pairs().inputs
    state = wrapped.start(inputs)
    token, written = torch.full((4,), wrapped.first_token), []
    for _ in range(10):
        logits, state = wrapped.step(token, state)
        for lane, one in enumerate(inputs):
            behind = [int(step[lane]) for step in written]
            expected = logits_of(network, one, behind)[-1]
            torch.testing.assert_close(logits[lane], expected, **TOLERANCE)
        token = logits.argmax(-1)
        written.append(token)


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_do_not_depend_on_the_batch(beams):
    wrapped, inputs = PairEncoderDecoder(model()), pairs().inputs
    options = GenerationOptions(8, beams=beams)
    together = generate(wrapped, inputs, options)
    alone = [generate(wrapped, [one], options)[0] for one in inputs]
    assert [list(text) for text in together] == [list(text) for text in alone]
    assert len({tuple(text) for text in together}) > 1


def test_a_decoder_without_a_state_is_refused():
    network = model("bst")
    network.longest_segment = 32
    with pytest.raises(ValueError, match="carries no state"):
        PairEncoderDecoder(network)
