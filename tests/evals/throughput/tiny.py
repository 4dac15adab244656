"""A model small enough to be timed in milliseconds, and its measurement."""

from pathlib import Path
from typing import Any

from evals.throughput.settings import Measurement

MODEL = """
model:
  d_model: 32
  n_layers: 2
  layers: {default: swa}
  mixers: {swa: {n_heads: 2, window_size: 16}}
"""


def write_model(folder: Path) -> str:
    """The path of the model's file."""
    path = folder / "tiny.yaml"
    path.write_text(MODEL, encoding="utf-8")
    return str(path)


def measurement(folder: Path, **changes: Any) -> Measurement:
    """Of the tiny model, in a plain loop on the CPU."""
    model = write_model(folder)
    settings: dict[str, Any] = {
        "model": model,
        "like": model,
        "vocab_size": 64,
        "length": 32,
        "batch_size": 2,
        "loop": "plain",
        "precision": "fp32",
        "compile": False,
        "checkpointing": False,
        "residual_in_fp32": True,
        "seconds": 0.01,
        "device": "cpu",
    }
    return Measurement(**settings | changes)
