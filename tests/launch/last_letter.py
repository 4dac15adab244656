"""A task that tiny models learn: is the last letter an a or a b? Answers are mostly a."""

import json
import random
from pathlib import Path
from typing import Any

MODEL = """
model:
  d_model: 16
  n_layers: 1
  layers: {default: swa}
  mixers: {swa: {n_heads: 2, window_size: 16}}
  d_ff: 32
  init_std: 0.3
"""


ENCODER_DECODER = """
model:
  d_model: 16
  n_layers: 1
  layers: {default: attention}
  mixers: {attention: {n_heads: 2}}
  encoder: {n_layers: 1, layers: {default: swa}, mixers: {swa: {n_heads: 2, window_size: 16}}}
  cross_attention: {n_heads: 2}
  d_ff: 32
  init_std: 0.3
objective: span
data: {mode: windows}
"""

WORDS = {
    "tokenizer": "bytes",
    "task": "jsonl",
    "train": "train.jsonl",
    "validation": "validation.jsonl",
    "test": "test.jsonl",
    "input_field": "text",
    "target_field": "label",
    "metrics": "accuracy",
    "seeds": "1",
    "batch_size": "16",
    "steps": "4",
    "check_every": "2",
    "learning_rate": "1e-2",
    "device": "cpu",
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_examples(folder: Path) -> None:
    """The files that `WORDS` name."""
    chance = random.Random(0)

    def rows(n: int) -> list[dict[str, str]]:
        texts = ["".join(chance.choices("xyz", k=chance.randint(1, 5))) for _ in range(n)]
        ends = [chance.choice("aab") for _ in texts]
        return [{"text": t + e, "label": e} for t, e in zip(texts, ends, strict=True)]

    for name, n in {"train": 90, "validation": 20, "test": 30}.items():
        write(folder / f"{name}.jsonl", rows(n))
