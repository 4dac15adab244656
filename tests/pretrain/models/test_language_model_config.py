"""Config errors are complete, and a pattern of layers is a model like any other."""

from typing import Any

import pytest
import torch

from pretrain.config import load_config
from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"layers": LayersConfig(pattern=["swa", "bst"], repeat=2)}, "n_layers=3 .* repeat=2 = 4"),
    ({"layers": LayersConfig()}, "either a pattern or a default"),
    ({"layers": LayersConfig(default="swa", pattern=["swa"] * 3)}, "either a pattern or a default"),
    ({"layers": LayersConfig(default="swa", at={3: "bst"})}, "n_layers=3 has 0..2"),
    ({"layers": LayersConfig(pattern=["swa"] * 3, at={0: "bst"})}, "put them into the pattern"),
    ({"layers": LayersConfig(default="bts")}, "did you mean 'bst'"),
    ({"mixers": {"swa": {"window": 4}}}, "did you mean 'window_size'"),
    ({"d_model": 36}, "does not divide d_model=36"),
    ({"mlp": "silu"}, "choose from swiglu, geglu, gelu, relu"),
    ({"reset_grid": 100}, "not a multiple of 512"),
    ({"d_ff": -1}, "must not be negative"),
    ({"vocab_size": 0}, "set it to the tokenizer's size"),
    ({"d_model": -2, "layers": LayersConfig(default="s4d")}, "d_model=-2 must be at least 1"),
    ({"init_std": -0.02}, "must not be negative"),
    ({"mixers": {"swa": 3}}, "swa=3 must be a mapping"),
    ({"layers": LayersConfig(default="fsat")}, "fsat.causal=True: .* encoders only"),
    ({"mixers": {"s4d": {"causal": False}}}, "s4d.causal=False: a decoder is causal"),
    ({"mixers": {"swa": {"window_size": "abc"}}}, "window_size='abc' must be of type int"),
]


def config(**changes: Any) -> LanguageModelConfig:
    settings: dict[str, Any] = {
        "vocab_size": 16,
        "d_model": 32,
        "n_layers": 3,
        "layers": LayersConfig(default="swa"),
    }
    return LanguageModelConfig(**settings | changes)


@pytest.mark.parametrize(("changes", "reason"), WRONG)
def test_wrong_configs_are_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LanguageModel(config(**changes))


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="mlp") as error:
        LanguageModel(config(mlp="silu", vocab_size=0, layers=LayersConfig(default="bts")))
    assert len(str(error.value).splitlines()) == 3


def test_exceptions_replace_the_default_layer() -> None:
    layers = LayersConfig(default="swa", at={0: "bst"})
    assert config(layers=layers).layer_names() == ["bst", "swa", "swa"]


def test_default_feed_forward_size_is_eight_thirds() -> None:
    assert config(d_model=1024).feed_forward_size == 2752
    assert config(d_model=1024, d_ff=100).feed_forward_size == 100


def test_masformer_is_a_pattern_of_layers_that_trains() -> None:
    """Full attention in a few layers, windows elsewhere; no mixer of its own."""
    torch.manual_seed(0)
    model = LanguageModel(load_config(["model=masformer_tiny", "model.vocab_size=4096"]).model)
    assert sorted(set(model.config.layer_names())) == ["attention", "swa"]
    assert not model.constant_state
    tokens = torch.randint(0, 4096, (1, 257))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(2):
        loss = model(tokens[:, :-1], targets=tokens[:, 1:]).loss_sum
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
