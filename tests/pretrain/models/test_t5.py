"""A T5 of transformers with random weights and ours with the same: logits, loss and gradients.

Shapes: B batch, S encoder tokens, T decoder tokens.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

from pretrain.models import EncoderDecoder
from pretrain.models.t5 import t5_config, t5_weights

SIZES = {"vocab_size": 53, "d_model": 32, "d_kv": 6, "num_heads": 4, "d_ff": 48, "num_layers": 2}
VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# Beyond T5's furthest bucket (128) on both sides; lanes of other lengths.
S, T = 300, 150
LENGTHS = torch.tensor([S, 170])
# fp32, relative to the largest: T5's norms and softmax are fp32 whatever the weights are.
SAME = 1e-5


def theirs_of(version: str) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    options = {**SIZES, "num_decoder_layers": 3, **VERSIONS[version]}
    model = T5ForConditionalGeneration(T5Config(**options, dropout_rate=0.0, use_cache=False))
    if version == "1.1":  # transformers 5 ties a new model's head whatever its configuration says
        model.lm_head.weight = nn.Parameter(torch.randn(53, 32) / 32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_attention_bias" in name or "layer_norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ours_of(version: str, weights: dict[str, Tensor]) -> EncoderDecoder:
    config = {**SIZES, "num_decoder_layers": 3, **VERSIONS[version]}
    model = EncoderDecoder(t5_config(config))
    model.load_state_dict(t5_weights(weights))
    return model


@pytest.mark.parametrize("version", VERSIONS)
def test_logits_loss_and_gradients_are_t5s(version: str) -> None:
    theirs = theirs_of(version)
    ours = ours_of(version, theirs.state_dict())
    encoder_tokens, targets = torch.randint(1, 53, (2, S)), torch.randint(1, 53, (2, T))
    encoder_mask = torch.arange(S) < LENGTHS[:, None]
    loss_mask = torch.arange(T) < torch.tensor([[T], [90]])
    tokens = torch.cat([torch.zeros(2, 1, dtype=torch.int64), targets[:, :-1]], 1)
    want = theirs(
        encoder_tokens,
        attention_mask=encoder_mask.long(),
        labels=targets.masked_fill(~loss_mask, -100),
        decoder_input_ids=tokens,
    )
    got = ours(
        tokens,
        encoder_tokens=encoder_tokens,
        encoder_mask=encoder_mask,
        targets=targets,
        loss_mask=loss_mask,
    )
    logits = ours.logits(got.hidden)
    torch.testing.assert_close(
        logits, want.logits, rtol=0, atol=SAME * want.logits.abs().max().item()
    )
    loss = got.loss_sum / loss_mask.sum()
    torch.testing.assert_close(loss, want.loss, rtol=SAME, atol=0)

    want.loss.backward()
    loss.backward()
    gradients = t5_weights({k: p.grad for k, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        largest = gradients[name].abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=0, atol=10 * SAME * largest, msg=name
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"feed_forward_proj": "gated-silu"}, "must be one of relu, gated-gelu"),
        ({"relative_attention_num_buckets": 16}, "every released T5 has 32"),
    ],
)
def test_what_is_no_t5_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        t5_config(SIZES | changes)
