"""Models: blocks of a token mixer and an MLP, and the decoder language model made of them."""

from pretrain.models.language_model import (
    LanguageModel,
    LanguageModelConfig,
    LayersConfig,
    ModelOutput,
    ModelState,
)

__all__ = ["LanguageModel", "LanguageModelConfig", "LayersConfig", "ModelOutput", "ModelState"]
