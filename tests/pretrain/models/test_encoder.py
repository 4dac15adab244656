"""An encoder over every two-sided mixer: pads change nothing, all that is learned is reached.

Shapes: B batch, T time.
"""

import pytest
import torch
from torch import Tensor

from pretrain import mixers
from pretrain.models import Encoder, EncoderConfig, LayersConfig

# The same sums in another order, fp64.
SAME = 1e-10
WINDOW = {"n_heads": 2, "window_size": 8}
SSM = {"n_modes": 3, "chunk_size": 4}
OPTIONS = {
    "attention": {"n_heads": 2},
    "ema": SSM,
    "fsat": {"n_heads": 2, "n_places": 4},
    "longvq": SSM | {"block_size": 8, "n_heads": 2, "d_shared": 8, "n_codes": 5},
    "s4": SSM,
    "s4d": SSM,
    "s5": SSM,
    "spade": SSM | WINDOW,
    "swa": WINDOW,
}
every_mixer = pytest.mark.parametrize("name", mixers.names(causal=False))
LENGTHS = torch.tensor([21, 13, 5])


def encoder(name: str = "s4d", **changes) -> Encoder:
    torch.manual_seed(0)
    values = {
        "n_classes": 3,
        "vocab_size": 11,
        "d_model": 8,
        "n_layers": 2,
        "layers": LayersConfig(default=name),
        "mixers": {name: OPTIONS[name]},
        "d_ff": 8,
    }
    return Encoder(EncoderConfig(**(values | changes))).double().eval()


def symbols(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


@every_mixer
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_what_stands_behind_a_sequence_changes_nothing(name, pooling):
    model = encoder(name, pooling=pooling, max_length=32)
    inputs, others = symbols(3, 21), symbols(3, 30, seed=2)
    behind = torch.arange(30) >= LENGTHS[:, None]
    padded = torch.where(behind, others, torch.nn.functional.pad(inputs, (0, 9)))
    got = model(padded, LENGTHS).logits
    alone = [model(row[None, :n]).logits[0] for row, n in zip(inputs, LENGTHS, strict=True)]
    torch.testing.assert_close(got, torch.stack(alone), rtol=0, atol=SAME)
    assert (got[0] - got[1]).abs().max() > 1e-4  # it does look at the input


@every_mixer
def test_every_parameter_gets_a_gradient(name):
    model = encoder(name, max_length=21).train()
    output = model(symbols(3, 21), LENGTHS)
    auxiliary = sum(value for key, value in output.aux.items() if key.endswith("_loss"))
    (output.logits.square().sum() + auxiliary).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


def test_real_inputs_are_lifted_and_reach_the_logits():
    model = encoder(vocab_size=0)
    inputs = torch.randn(3, 21, dtype=torch.float64, requires_grad=True)
    model(inputs, LENGTHS).logits.square().sum().backward()
    assert torch.equal(inputs.grad != 0, torch.arange(21) < LENGTHS[:, None])
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_cls_reads_the_symbols_and_is_learned():
    model = encoder(pooling="cls")
    assert (model(symbols(1, 9)).logits - model(symbols(1, 9, seed=2)).logits).abs().max() > 1e-6
    model(symbols(3, 21), LENGTHS).logits.square().sum().backward()
    for key, parameter in model.named_parameters():  # the last layer's MLP, too
        assert parameter.grad.abs().max() > 0, key
    assert model.embedding.weight.grad.abs().max() > 0


def test_mean_pooling_counts_symbols_and_not_pads():
    model = encoder()
    model.blocks = torch.nn.ModuleList()  # what is left is a bag of symbols
    once, twice = torch.tensor([[3, 7]]), torch.tensor([[3, 7, 3, 7, 9]])
    torch.testing.assert_close(model(once).logits, model(twice, torch.tensor([4])).logits)
    assert (model(once).logits - model(twice).logits).abs().max() > 1e-4


def test_two_inputs_are_read_alike_and_kept_apart():
    model = encoder(n_inputs=2)
    pair, lengths = symbols(2, 2, 9), torch.tensor([[9, 4], [6, 9]])
    swapped = model(pair.flip(1), lengths.flip(1)).logits
    got = model(pair, lengths).logits
    assert got.shape == (2, 3)
    assert (got - swapped).abs().max() > 1e-6  # the head sees a - b
    pooled = [model._encode(pair[:, k], lengths[:, k])[0] for k in range(2)]
    both = torch.cat([*pooled, pooled[0] - pooled[1], pooled[0] * pooled[1]], -1)
    torch.testing.assert_close(got, model.head(both), rtol=0, atol=SAME)


def test_positions_tell_where_a_symbol_stands():
    inputs = symbols(1, 9)
    for max_length, differs in ((0, False), (9, True)):
        model = encoder(max_length=max_length)
        model.blocks = torch.nn.ModuleList()
        one, other = model(inputs).logits, model(inputs.flip(1)).logits
        if differs:  # a mean is blind to which symbol stands where, a nonlinear norm is not
            assert (one - other).abs().max() > 1e-6
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=SAME)


def test_position_biases_are_one_table_for_all_layers():
    model = encoder("swa", mixers={"swa": WINDOW | {"position": "t5"}})
    tables = [key for key, _ in model.named_parameters() if key.endswith("table")]
    assert tables == ["blocks.0.mixer.position_bias.table"]


def test_codebooks_learn_from_what_training_reports():
    model = encoder("longvq").train()
    before = model.blocks[0].mixer.codes.codebook.clone()
    aux = model(symbols(3, 21), LENGTHS).aux
    model.update_buffers({k: v for k, v in aux.items() if not k.endswith("_loss")})
    assert not torch.equal(model.blocks[0].mixer.codes.codebook, before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": LayersConfig(default="bst"), "mixers": {}}, "'bst' has no two-sided form"),
        ({"pooling": "max"}, "encoder.pooling='max': choose from mean, cls"),
        ({"n_inputs": 3}, "n_inputs=3 must be 1 or 2"),
        ({"n_classes": 1}, "n_classes=1 must be at least 2"),
        ({"layers": LayersConfig()}, "either a pattern or a default"),
        ({"mixers": {"s4d": {"causal": True}}}, "s4d.causal"),
        ({"mixers": {"s4d": {"n_mode": 3}}}, "did you mean 'n_modes'"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        encoder(**changes)


def test_inputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="n_inputs=2 takes"):
        encoder(n_inputs=2)(symbols(2, 9))
    with pytest.raises(ValueError, match="max_length=8"):
        encoder(max_length=8)(symbols(2, 9))
