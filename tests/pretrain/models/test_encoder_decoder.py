"""An encoder-decoder over every pair of mixers: what it sees, how it decodes, what cannot be built.

Shapes: B batch, S encoder tokens, T decoder tokens.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import mixers
from pretrain.mixers.base import index_state
from pretrain.models import (
    EncoderDecoder,
    EncoderStackConfig,
    LanguageModel,
    LanguageModelConfig,
    LayersConfig,
    build_model,
)

# The same sums in another order, fp64.
SAME = 1e-10
VOCABULARY, S, T = 19, 21, 13
LENGTHS = torch.tensor([S, 13, 5])
WINDOW = {"n_heads": 2, "window_size": 8}
SSM = {"n_modes": 3, "chunk_size": 4}
LONGVQ = SSM | {"block_size": 8, "n_heads": 2, "d_shared": 8, "n_codes": 5}
ENCODER: dict[str, dict[str, Any]] = {
    "attention": {"n_heads": 2, "position": "t5"},
    "ema": SSM,
    "fsat": {"n_heads": 2, "n_places": 4},
    "longvq": LONGVQ,
    "s4": SSM,
    "s4d": SSM,
    "s5": SSM,
    "spade": SSM | WINDOW,
    "swa": WINDOW,
}
DECODER: dict[str, dict[str, Any]] = {
    "attention": {"n_heads": 2, "position": "t5"},
    "bst": SSM | {"n_heads": 2, "block_size": 8},
    "longvq": LONGVQ,
    "mamba2": {"head_dim": 4, "d_state": 3, "chunk_size": 4},
    "s4d": SSM,
    "spade": SSM | WINDOW,
}
every_encoder = pytest.mark.parametrize("name", mixers.names(causal=False))
every_decoder = pytest.mark.parametrize("name", DECODER)


def config_of(encoder: str = "spade", decoder: str = "attention", **changes) -> LanguageModelConfig:
    config = LanguageModelConfig(
        vocab_size=VOCABULARY,
        d_model=8,
        n_layers=2,
        layers=LayersConfig(default=decoder),
        mixers={decoder: DECODER[decoder]},
        d_ff=8,
        init_std=0.3,
        encoder=EncoderStackConfig(
            n_layers=3, layers=LayersConfig(default=encoder), mixers={encoder: ENCODER[encoder]}
        ),
        cross_attention={"n_heads": 2},
    )
    return replace(config, **changes)


def model_of(encoder: str = "spade", decoder: str = "attention", **changes) -> EncoderDecoder:
    torch.manual_seed(0)
    return EncoderDecoder(config_of(encoder, decoder, **changes)).double().eval()


def batch(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder tokens (B, S), their mask, decoder tokens (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    encoder_tokens = torch.randint(VOCABULARY, (3, S), generator=generator)
    tokens = torch.randint(VOCABULARY, (3, T), generator=generator)
    return encoder_tokens, torch.arange(S) < LENGTHS[:, None], tokens


@every_encoder
def test_what_stands_behind_an_input_changes_nothing(name: str) -> None:
    model = model_of(name)
    encoder_tokens, mask, tokens = batch()
    others = torch.randint(VOCABULARY, (3, 30))
    behind = torch.arange(30) >= LENGTHS[:, None]
    padded = torch.where(behind, others, torch.nn.functional.pad(encoder_tokens, (0, 9)))
    got = model(tokens, encoder_tokens=padded, encoder_mask=~behind).hidden
    alone = [
        model(tokens[row : row + 1], encoder_tokens=encoder_tokens[row : row + 1, :length]).hidden
        for row, length in enumerate(LENGTHS.tolist())
    ]
    torch.testing.assert_close(got, torch.cat(alone), rtol=0, atol=SAME)
    read = (encoder_tokens + 1) % VOCABULARY
    other = model(tokens, encoder_tokens=read, encoder_mask=mask).hidden
    assert (got - other).abs().amax((1, 2)).min() > 1e-4  # it does read the input


@every_encoder
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = model_of(name).train()
    encoder_tokens, mask, tokens = batch()
    output = model(
        tokens[:, :-1], encoder_tokens=encoder_tokens, encoder_mask=mask, targets=tokens[:, 1:]
    )
    losses = [value for key, value in output.aux.items() if key.endswith("_loss")]
    (output.loss_sum + sum(losses)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


@every_decoder
def test_decoding_token_by_token_equals_one_pass(name: str) -> None:
    model = model_of(decoder=name)
    encoder_tokens, mask, tokens = batch()
    want = model(tokens, encoder_tokens=encoder_tokens, encoder_mask=mask)
    state, found = model.start(encoder_tokens, mask), []
    for t in range(T):
        output = model(tokens[:, t : t + 1], state)
        assert output.state.memory is state.memory  # made once
        state = output.state
        found.append(output.hidden)
    torch.testing.assert_close(torch.cat(found, 1), want.hidden, rtol=0, atol=SAME)


def test_lanes_of_a_state_can_be_chosen_and_repeated_as_beams_are() -> None:
    model = model_of()
    encoder_tokens, mask, tokens = batch()
    state = model(tokens[:, :5], model.start(encoder_tokens, mask)).state
    beams = torch.tensor([2, 0, 2, 1])
    got = model(tokens[beams, 5:], index_state(state, beams)).hidden
    want = model(tokens[:, 5:], state).hidden[beams]
    torch.testing.assert_close(got, want, rtol=0, atol=SAME)


@every_decoder
def test_no_target_is_seen_before_its_time(name: str) -> None:
    model = model_of(decoder=name)
    encoder_tokens, mask, tokens = batch()
    later = tokens.clone()
    later[:, 7:] = (later[:, 7:] + 1) % VOCABULARY
    one, other = (
        model(x, encoder_tokens=encoder_tokens, encoder_mask=mask).hidden for x in (tokens, later)
    )
    torch.testing.assert_close(one[:, :7], other[:, :7], rtol=0, atol=SAME)
    assert (one[:, 7:] - other[:, 7:]).abs().max() > 1e-4


def test_losses_are_of_counted_targets_and_add_up() -> None:
    model = model_of()
    encoder_tokens, mask, tokens = batch()
    loss_mask = torch.rand(3, T - 1) < 0.6
    output = model(
        tokens[:, :-1],
        encoder_tokens=encoder_tokens,
        encoder_mask=mask,
        targets=tokens[:, 1:],
        loss_mask=loss_mask,
        per_token=True,
    )
    nll = -model.logits(output.hidden).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(output.nll, nll * loss_mask)
    torch.testing.assert_close(output.loss_sum, output.nll.sum())


def test_recomputed_layers_give_the_same_gradients() -> None:
    encoder_tokens, mask, tokens = batch()
    gradients = []
    for recompute in (False, True):
        model = model_of(activation_checkpointing=recompute)
        hidden = model(tokens, encoder_tokens=encoder_tokens, encoder_mask=mask).hidden
        hidden.square().cumsum(1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_encoder_and_decoder_have_one_table_of_distances_each() -> None:
    tables = [key for key, _ in model_of("attention").named_parameters() if key.endswith("table")]
    assert tables == [
        f"{side}_blocks.0.mixer.position_bias.table" for side in ("encoder", "decoder")
    ]


def test_codebooks_of_both_sides_learn_from_what_training_reports() -> None:
    model = model_of("longvq", "longvq").train()
    encoder_tokens, mask, tokens = batch()
    before = [b.clone() for b in model.buffers() if b.ndim == 3]
    aux = model(tokens, encoder_tokens=encoder_tokens, encoder_mask=mask).aux
    model.update_buffers({k: v for k, v in aux.items() if not k.endswith("_loss")})
    after = [b for b in model.buffers() if b.ndim == 3]
    assert len(after) >= 5  # two layers and three
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_parameters_are_all_counted_and_flops_by_hand() -> None:
    model = model_of("attention", tie_embeddings=False)
    assert sum(model.parameter_counts().values()) == sum(p.numel() for p in model.parameters())
    flops = model.flops_per_token(40, 10)
    assert flops["encoder attention"] == 3 * (8 * 8**2 + 4 * 8 * 40)
    assert flops["decoder attention"] == 2 * (8 * 8**2 + 4 * 8 * 5.5) * 10 / 40
    # q and the way out for 10 tokens, k and v for 40, and 40 x 10 scores.
    assert flops["cross attention"] == 2 * (4 * 8**2 * 50 + 4 * 8 * 400) / 40
    assert flops["mlp"] == 2 * (3 * 8 * 8) * (3 + 2 * 10 / 40)
    assert flops["head"] == 2 * 8 * VOCABULARY * 10 / 40


def test_the_kind_of_model_follows_from_the_configuration() -> None:
    config = config_of()
    decoder = replace(config, encoder=EncoderStackConfig(), cross_attention={})
    assert type(build_model(config)) is EncoderDecoder
    assert type(build_model(decoder)) is LanguageModel


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"encoder": EncoderStackConfig(n_layers=2, layers=LayersConfig(default="bst"))},
            "model.encoder.mixers: causal=False: mixer 'bst' has no two-sided form",
        ),
        (
            {"encoder": EncoderStackConfig(n_layers=2, layers=LayersConfig(pattern=["swa"]))},
            "model.encoder.n_layers=2 but layers.pattern has 1",
        ),
        ({"encoder": EncoderStackConfig(n_layers=-1)}, "encoder.n_layers=-1 must not be negative"),
        (
            {"encoder": EncoderStackConfig()},
            "model.cross_attention without an encoder: give model.encoder.n_layers",
        ),
        ({"cross_attention": {"heads": 2}}, "unknown option cross_attention.heads"),
        ({"cross_attention": {"n_heads": 3}}, "cross_attention.n_heads=3 does not divide"),
        (
            {"cross_attention": {"n_heads": 2, "qk_norm": True, "scale_scores": False}},
            "cross_attention.scale_scores=false with qk_norm=true",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build_model(replace(config_of(), **changes))


def test_a_language_model_does_not_swallow_an_encoder() -> None:
    with pytest.raises(ValueError, match="this is an encoder-decoder"):
        LanguageModel(config_of())


def test_an_input_is_given_once() -> None:
    model = model_of()
    encoder_tokens, _, tokens = batch()
    for arguments in ({}, {"encoder_tokens": encoder_tokens, "state": model.start(encoder_tokens)}):
        with pytest.raises(ValueError, match="either encoder_tokens"):
            model(tokens, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["attention", "longvq", "spade", "swa"])
def test_a_gpu_computes_the_same(name: str, padded: bool) -> None:
    """Other kernels run there: fused attention with and without a mask, chunked scans."""
    model, (encoder_tokens, mask, tokens) = model_of(name), batch()
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = model.to(device, dtype)
        model.zero_grad()
        loss = model(
            tokens[:, :-1].to(device),
            encoder_tokens=encoder_tokens.to(device),
            encoder_mask=mask.to(device) if padded else None,
            targets=tokens[:, 1:].to(device),
        ).loss_sum
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.item(), torch.cat(gradients).double().cpu()))
    (want, want_gradients), (got, gradients) = found
    assert got == pytest.approx(want, rel=1e-4)  # fp32
    assert (gradients - want_gradients).norm() < 1e-3 * want_gradients.norm()
