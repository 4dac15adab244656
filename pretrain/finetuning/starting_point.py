"""What a fine-tuning starts from: a trained run, or a model that has seen nothing."""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.loader import start_id
from data.shards import Corpus
from data.tokenizer import BOS_ID, Tokenizer, load_tokenizer
from pretrain.config import RunConfig, load_config
from pretrain.finetuning.classifier import (
    EncoderClassifier,
    LabelClassifier,
    LastTokenClassifier,
)
from pretrain.finetuning.encoder_decoder import PairEncoderDecoder
from pretrain.finetuning.interface import PairModel
from pretrain.finetuning.prompted import prompted
from pretrain.models import EncoderDecoder, LanguageModel, LanguageModelConfig, build_model
from pretrain.training.load import load_any_model


@dataclass(frozen=True)
class StartingPoint:
    """A model to be.

    Attributes:
        config: of the model.
        weights: None: initialised at random, by seed.
        tokenizer: the model's.
        start_id: what stood before documents in a language model's pretraining.
        facts: for settings.json: which checkpoint, which tokenizer.
        passed_over: a line for every newer checkpoint of the run that is not complete.
    """

    config: LanguageModelConfig
    weights: dict[str, Tensor] | None
    tokenizer: Tokenizer
    start_id: int
    facts: dict[str, Any]
    passed_over: tuple[str, ...] = ()

    def build(self, seed: int, device: torch.device, *, autocast: bool) -> PairModel:
        """A fresh model that writes; the seed is that of random weights.

        Args:
            seed: of torch's generator.
            device: where it is to be.
            autocast: matmuls in bfloat16.
        """
        model = self._build(seed, device)
        if isinstance(model, EncoderDecoder):
            return PairEncoderDecoder(model, autocast=autocast)
        return prompted(model, self.start_id, autocast=autocast)

    def build_classifier(
        self, seed: int, device: torch.device, n_classes: int, *, autocast: bool
    ) -> LabelClassifier:
        """A fresh model with a head; the seed is that of random weights, the head's among them.

        Args:
            seed: of torch's generator.
            device: where it is to be.
            n_classes: labels to choose from.
            autocast: matmuls in bfloat16.
        """
        model = self._build(seed, device)
        if isinstance(model, EncoderDecoder):
            return EncoderClassifier(model, n_classes, autocast=autocast)
        return LastTokenClassifier(model, n_classes, self.start_id, autocast=autocast)

    def _build(self, seed: int, device: torch.device) -> LanguageModel | EncoderDecoder:
        torch.manual_seed(seed)
        model = build_model(self.config)
        if self.weights is not None:
            model.load_state_dict(self.weights)
        return model.to(device)


def from_run(
    run: Path, *, tag: str, tokenizer: str, random: bool, dropout: float | None
) -> StartingPoint:
    """The model of a run, with its weights or, as a control, without.

    Args:
        run: a run directory.
        tag: of the checkpoint.
        tokenizer: "bytes" or a .model file; "": the one of the corpus that the run read.
        random: leave the weights out.
        dropout: of the fine-tuning; None: the run's.

    Raises:
        ValueError: there is no such run, or the tokenizer is another one.
        CheckpointError: the checkpoint is missing or damaged.
    """
    if not run.is_dir():
        raise ValueError(f"run={run}: no such folder; use a run directory such as runs/NAME")
    model, config, checkpoint = load_any_model(run, tag)
    found = load_tokenizer(tokenizer) if tokenizer else _tokenizer_of(run, config)
    if found.sha256 != checkpoint["tokenizer"]:
        raise ValueError(
            f"tokenizer={tokenizer or config.data.path}: not the one that {run} was trained with "
            f"({found.sha256[:12]}, not {checkpoint['tokenizer'][:12]}); name that one's .model"
        )
    weights = None if random else model.state_dict()
    start = start_id(config.data.mode, config.data.boundary)
    facts = {"run": str(run), "checkpoint": Path(checkpoint["path"]).name}
    if dropout is not None:
        config.model.dropout = dropout
    point = _starting_point(config.model, weights, found, start, facts)
    return replace(point, passed_over=tuple(checkpoint["passed_over"]))


def untrained(words: list[str], tokenizer: str, dropout: float | None) -> StartingPoint:
    """A model that has seen nothing.

    Args:
        words: `model=NAME` and `model.KEY=VALUE`, as launch/train.py takes them.
        tokenizer: "bytes" or a .model file.
        dropout: of the training; None: the model's.

    Raises:
        ValueError: there is no such model or tokenizer.
    """
    if not tokenizer:
        raise ValueError("tokenizer= is missing: model= has none; give bytes or a .model file")
    found = load_tokenizer(tokenizer)
    config = load_config(words).model
    config.vocab_size = config.vocab_size or found.vocab_size
    if dropout is not None:
        config.dropout = dropout
    return _starting_point(config, None, found, BOS_ID, {"model": " ".join(words)})


def _starting_point(
    config: LanguageModelConfig,
    weights: dict[str, Tensor] | None,
    tokenizer: Tokenizer,
    start: int,
    facts: dict[str, Any],
) -> StartingPoint:
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size}; leave it out"
        )
    facts |= {
        "weights": "random" if weights is None else "trained",
        "tokenizer": tokenizer.sha256,
        "config": OmegaConf.to_container(OmegaConf.structured(config)),
    }
    return StartingPoint(config, weights, tokenizer, start, facts)


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The `config` of an earlier `facts`; keys that models did not have then have their default.

    Args:
        config: as read from JSON, whose keys are text, layer indices too; so is what is returned.
    """
    config = copy.deepcopy(config)
    for stack in (config, config.get("encoder", {})):
        layers = stack.get("layers", {})
        layers["at"] = {int(index): name for index, name in layers.get("at", {}).items()}
    known = OmegaConf.merge(OmegaConf.structured(LanguageModelConfig), config)
    return cast(dict[str, Any], json.loads(json.dumps(OmegaConf.to_container(known))))


def _tokenizer_of(run: Path, config: RunConfig) -> Tokenizer:
    if config.data.mode == "stream":
        return load_tokenizer(config.data.tokenizer)
    corpora = [config.data.path, *(entry.path for entry in config.data.mixture)]
    place = next(path for path in corpora if path)
    try:
        return Corpus.open(place, config.data.val_split).tokenizer
    except ValueError as error:
        raise ValueError(
            f"run={run}: its tokenizer is that of {place}, which cannot be read ({error}); set "
            f"tokenizer= to the .model file or bytes"
        ) from error
