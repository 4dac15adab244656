"""longspan: pretraining long-sequence language models."""

__version__ = "0.1.0"
