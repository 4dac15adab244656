"""Dropout: of all that joins the residual stream, in training, and of nothing else."""

import pytest
import torch
from torch import Tensor, nn

from pretrain.config import load_config
from pretrain.models import build_model

# Each way to join the stream: mixers, a gated one, cross-attention, MLPs, both embeddings.
MODELS = ["swa_tiny", "block_recurrent_tiny", "spade_t5_tiny"]
every_model = pytest.mark.parametrize("name", MODELS)


def model_of(name: str, dropout: float) -> nn.Module:
    config = load_config([f"model={name}", f"model.dropout={dropout}"]).model
    config.vocab_size = 64
    torch.manual_seed(0)
    return build_model(config)


def read(model: nn.Module, seed: int = 1) -> Tensor:
    """(1, T, D), what the last norm gives."""
    tokens = torch.arange(256).remainder(64).unsqueeze(0)
    inputs = {"encoder_tokens": tokens} if hasattr(model, "encoder_blocks") else {}
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(tokens, **inputs).hidden


@every_model
def test_nothing_reaches_the_stream_but_through_dropout(name: str) -> None:
    model = model_of(name, 0.5)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(dropouts) == 1 + len(model.blocks)
    for module in dropouts:
        module.p = 1.0
    tokens = torch.arange(256).remainder(64).unsqueeze(0)
    assert read(model).count_nonzero() == 0
    if hasattr(model, "encode"):
        assert model.encode(tokens)[0].count_nonzero() == 0
    model.dropout.p = 0.0
    assert torch.equal(read(model), model.norm(model.embedding(tokens)))


@every_model
def test_masks_are_of_training_and_of_the_generator(name: str) -> None:
    model, without = model_of(name, 0.5), model_of(name, 0.0)
    assert torch.equal(read(model), read(model))
    assert not torch.equal(read(model), read(model, seed=2))
    assert torch.equal(read(model.eval()), read(without))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.dropout={rate}: must be at least 0"):
        model_of("swa_tiny", rate)
