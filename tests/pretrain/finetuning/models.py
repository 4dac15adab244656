"""Small language models for the tests of fine-tuning."""

import torch

from pretrain.models import LanguageModel, LanguageModelConfig, LayersConfig

VOCAB = 32
MIXERS = {
    "swa": {"n_heads": 2, "window_size": 8},
    "attention": {"n_heads": 2},
    "s4d": {"n_modes": 3, "chunk_size": 8},
    "bst": {"n_heads": 2, "block_size": 8, "n_modes": 4, "chunk_size": 8},
    "longvq": {"n_heads": 2, "block_size": 8, "n_modes": 3, "chunk_size": 8},
}


def language_model(*pattern: str, options=None, seed=0) -> LanguageModel:
    """With weights large enough that logits differ clearly."""
    torch.manual_seed(seed)
    config = LanguageModelConfig(
        vocab_size=VOCAB,
        d_model=16,
        n_layers=len(pattern),
        layers=LayersConfig(pattern=list(pattern)),
        mixers=options or {name: MIXERS[name] for name in pattern},
        d_ff=32,
        init_std=0.3,
    )
    return LanguageModel(config).eval()
