"""Models of blocks, a token mixer and an MLP each: language models, encoder-decoders, encoders."""

from pretrain.models.config import EncoderStackConfig, LanguageModelConfig, LayersConfig
from pretrain.models.encoder import Encoder, EncoderConfig
from pretrain.models.encoder_decoder import DecoderState, EncoderDecoder
from pretrain.models.language_model import LanguageModel, ModelOutput, ModelState


def build_model(config: LanguageModelConfig) -> LanguageModel | EncoderDecoder:
    """The model that a configuration describes: with an encoder or without.

    Raises:
        ValueError: every problem of the config, at once.
    """
    return EncoderDecoder(config) if config.has_encoder else LanguageModel(config)


__all__ = [
    "DecoderState",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderStackConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "LayersConfig",
    "ModelOutput",
    "ModelState",
    "build_model",
]
