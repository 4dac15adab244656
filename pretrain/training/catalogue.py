"""Every model under `configs/model` at a glance, for who has not picked one yet.

Printed by `launch/train.py dry_run=true` without a model.
"""

from dataclasses import dataclass, replace
from itertools import groupby

import torch

from pretrain.config import CONFIG_DIR, load_config
from pretrain.models import LanguageModelConfig, LayersConfig, build_model


@dataclass(frozen=True)
class Entry:
    """One model; `train_flops_per_token` is forward and backward at the segment asked for."""

    name: str
    parameters: int
    layers: str
    constant_state: bool
    reset_grid: int
    train_flops_per_token: float


def catalogue(vocab_size: int, seq_len: int, names: str = "*") -> list[Entry]:
    """The shipped models, smallest first.

    Args:
        vocab_size: entries of the tokenizer, which every model is built with.
        seq_len: tokens of a document in `train_flops_per_token`.
        names: which models, as in a shell: "*_125m".
    """
    entries = []
    for path in (CONFIG_DIR / "model").glob(f"{names}.yaml"):
        config = replace(load_config([f"model={path}"]).model, vocab_size=vocab_size)
        with torch.device("meta"):
            model = build_model(config)
        entries.append(
            Entry(
                name=path.stem,
                parameters=sum(model.parameter_counts().values()),
                layers=short_layers(config),
                constant_state=model.constant_state,
                reset_grid=model.reset_grid,
                train_flops_per_token=3.0 * sum(model.flops_per_token(seq_len).values()),
            )
        )
    return sorted(entries, key=lambda entry: (entry.parameters, entry.name))


def short_layers(config: LanguageModelConfig) -> str:
    """Bottom first, equal neighbours together: "2 swa, bst, 9 swa"; "(3 gss, swa) x 6".

    An encoder's come first: "spade, 11 swa -> 12 attention".
    """
    decoder = _in_short(config.layers, config.layer_names())
    if not config.has_encoder:
        return decoder
    return f"{_in_short(config.encoder.layers, config.encoder_layer_names())} -> {decoder}"


def _in_short(layers: LayersConfig, names: list[str]) -> str:
    pattern = list(layers.pattern)
    runs = [(name, len(list(group))) for name, group in groupby(pattern or names)]
    text = ", ".join(f"{count} {name}" if count > 1 else name for name, count in runs)
    return f"({text}) x {layers.repeat}" if pattern and layers.repeat > 1 else text


def describe_catalogue(entries: list[Entry], vocab_size: int, seq_len: int) -> str:
    """The table, with a line that says what its numbers rest on."""
    wide = max(len(entry.name) for entry in entries)
    lines = [
        f"models at a vocabulary of {vocab_size:,}; train FLOPs per token in documents of "
        f"{seq_len:,} tokens, of encoder-decoders per token that is read; pick one by model=NAME",
        "",
        f"{'name':<{wide}}  {'parameters':>13}  {'MFLOPs/token':>12}  constant state  layers",
    ]
    lines += [
        f"{entry.name:<{wide}}  {entry.parameters:>13,}  "
        f"{entry.train_flops_per_token / 1e6:>12,.0f}  "
        f"{'yes' if entry.constant_state else 'no':<14}  {entry.layers}"
        for entry in entries
    ]
    return "\n".join(lines)
