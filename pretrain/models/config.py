"""What shapes a model: the layers of a decoder, and of the encoder that it may read.

One section serves both kinds of model: with `encoder.n_layers` above 0 the decoder's layers also
read an encoder's output (`pretrain.models.EncoderDecoder`), which has the decoder's width and MLPs.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from pretrain.mixers import TokenMixer, build, check_options, defaults_of
from pretrain.models.cross_attention import CrossAttention
from pretrain.models.layers import MLPS


@dataclass
class LayersConfig:
    """Which mixer each layer has: a pattern, or a default with exceptions.

    Attributes:
        pattern: mixer names from the bottom up.
        repeat: how often the pattern is repeated; the product is `n_layers`.
        default: the mixer of every layer, instead of a pattern.
        at: exceptions to the default, by layer index (0 is the bottom).
    """

    pattern: list[str] = field(default_factory=list)
    repeat: int = 1
    default: str = ""
    at: dict[int, str] = field(default_factory=dict)

    def names(self, n_layers: int, owner: str = "model") -> list[str]:
        """The mixer of each of `n_layers` layers, bottom first; `owner` names the keys in errors.

        Raises:
            ValueError: pattern and default both or neither given, wrong total, index out of range.
        """
        if bool(self.pattern) == bool(self.default):
            raise ValueError(
                f"{owner}.layers: give either a pattern or a default, not both and not neither "
                f"(pattern={list(self.pattern)}, default={self.default!r})"
            )
        if self.pattern:
            names = list(self.pattern) * self.repeat
            if self.at:
                raise ValueError(
                    f"{owner}.layers.at={dict(self.at)} are exceptions to a default, but a pattern "
                    f"is given: put them into the pattern"
                )
            if len(names) != n_layers:
                raise ValueError(
                    f"{owner}.n_layers={n_layers} but layers.pattern has {len(self.pattern)} "
                    f"layers x repeat={self.repeat} = {len(names)}: make them equal"
                )
            return names
        outside = [index for index in self.at if not 0 <= index < n_layers]
        if outside:
            raise ValueError(
                f"{owner}.layers.at names layers {outside}, but n_layers={n_layers} has "
                f"0..{n_layers - 1}"
            )
        return [self.at.get(index, self.default) for index in range(n_layers)]


@dataclass
class EncoderStackConfig:
    """The encoder in front of a decoder; width, MLPs and vocabulary are the decoder's.

    Attributes:
        n_layers: number of layers; 0: there is no encoder.
        layers: the mixer of each layer; mixers are two-sided here.
        mixers: options by mixer name.
    """

    n_layers: int = 0
    layers: LayersConfig = field(default_factory=LayersConfig)
    mixers: dict[str, Any] = field(default_factory=dict)


@dataclass
class LanguageModelConfig:
    """Everything that shapes the model; layers, mixers and grids are the decoder's.

    Attributes:
        vocab_size: 0 where the tokenizer is still to fill it in.
        d_model: model width.
        n_layers: number of layers; `layers` must agree.
        layers: the mixer of each layer.
        mixers: options by mixer name.
        mlp: "swiglu", "gelu", or T5's "relu" and, since its version 1.1, "geglu".
        d_ff: hidden width of the MLP; 0: 8/3 d_model rounded up to a multiple of 64.
        tie_embeddings: the head uses the embedding matrix.
        scale_logits: the head's input is divided by sqrt(d_model), as T5's is where it is tied.
        dropout: of the embeddings and of what mixers, cross-attention and MLPs add to the residual
            stream (Vaswani et al. 2017, 1706.03762, 5.4). Masks depend on the number of processes
            and on micro-batches; a resumed run draws those of its step again.
        init_std: of embeddings and weights; projections onto the residual stream are smaller by
            1 / sqrt(2 n_layers).
        residual_in_fp32: False: the residual stream has autocast's dtype, which rounds every sum
            and halves its memory and its traffic. Without autocast it makes no difference. Norms
            and the loss compute in at least fp32 either way.
        loss_chunk_size: tokens whose logits exist at one time.
        activation_checkpointing: recompute each block in the backward.
        reset_grid: tokens between places where a document may begin; 0: the least common multiple
            of the layers' own grids, otherwise a multiple of it. Models to be compared on the same
            batches need the same grid.
        encoder: the encoder of an encoder-decoder model.
        cross_attention: options of the layers' attention to the encoder, see `CrossAttention`.
    """

    vocab_size: int = 0
    d_model: int = 256
    n_layers: int = 4
    layers: LayersConfig = field(default_factory=LayersConfig)
    mixers: dict[str, Any] = field(default_factory=dict)
    mlp: str = "swiglu"
    d_ff: int = 0
    tie_embeddings: bool = True
    scale_logits: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    residual_in_fp32: bool = True
    loss_chunk_size: int = 4096
    activation_checkpointing: bool = False
    reset_grid: int = 0
    encoder: EncoderStackConfig = field(default_factory=EncoderStackConfig)
    cross_attention: dict[str, Any] = field(default_factory=dict)

    @property
    def has_encoder(self) -> bool:
        """Whether this is an encoder-decoder model."""
        return self.encoder.n_layers > 0

    def common_grid(self, grids: Iterable[int]) -> int:
        """`reset_grid`, or the least common multiple of the layers' own."""
        return self.reset_grid or math.lcm(*grids)

    def layer_names(self) -> list[str]:
        """The mixer of each layer, bottom first; see `LayersConfig.names`."""
        return self.layers.names(self.n_layers)

    def encoder_layer_names(self) -> list[str]:
        """The mixer of each encoder layer, bottom first; see `LayersConfig.names`."""
        if not self.has_encoder:
            return []
        return self.encoder.layers.names(self.encoder.n_layers, "model.encoder")

    @property
    def feed_forward_size(self) -> int:
        """`d_ff` with the default filled in."""
        return self.d_ff or 64 * math.ceil(8 * self.d_model / 3 / 64)

    def problems(self) -> list[str]:
        """Everything wrong with this config, one message each; empty when it can be built."""
        found = []
        for name in ("d_model", "n_layers", "loss_chunk_size"):
            if getattr(self, name) < 1:
                found.append(f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("vocab_size", "d_ff", "reset_grid", "init_std"):
            if getattr(self, name) < 0:
                found.append(f"model.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.dropout < 1:
            found.append(f"model.dropout={self.dropout}: must be at least 0 and less than 1")
        if self.mlp not in MLPS:
            found.append(f"model.mlp={self.mlp!r} is unknown: choose from {', '.join(MLPS)}")
        try:
            used = set(self.layer_names())
        except ValueError as error:
            found.append(str(error))
            used = set()
        if self.d_model < 1:  # nothing can be built to look at
            return found
        grids = []
        for name in sorted(used | set(self.mixers)):
            try:
                with torch.device("meta"):
                    grids.append(self.build_mixer(name).block_size)
            except ValueError as error:
                found.append(f"model.mixers: {error}")
        grid = math.lcm(*grids)
        if self.reset_grid > 0 and self.reset_grid % grid:
            found.append(
                f"model.reset_grid={self.reset_grid} is not a multiple of {grid}, the least common "
                f"multiple of the layers' grids: choose a multiple, or 0"
            )
        return found + self._encoder_problems()

    def _encoder_problems(self) -> list[str]:
        if self.encoder.n_layers < 0:
            return [f"model.encoder.n_layers={self.encoder.n_layers} must not be negative"]
        if not self.has_encoder:
            given = {
                "model.encoder.layers": self.encoder.layers != LayersConfig(),
                "model.encoder.mixers": bool(self.encoder.mixers),
                "model.cross_attention": bool(self.cross_attention),
            }
            return [
                f"{key} without an encoder: give model.encoder.n_layers, or leave it out"
                for key, is_given in given.items()
                if is_given
            ]
        found = []
        try:
            used = set(self.encoder_layer_names())
        except ValueError as error:
            found.append(str(error))
            used = set()
        with torch.device("meta"):
            for name in sorted(used | set(self.encoder.mixers)):
                try:
                    self.build_encoder_mixer(name)
                except ValueError as error:
                    found.append(f"model.encoder.mixers: {error}")
            try:
                self.build_cross_attention()
            except ValueError as error:
                found.append(f"model: {error}")
        return found

    def build_mixer(self, name: str) -> TokenMixer:
        """A new mixer of this model's width with the options given for its name.

        Raises:
            ValueError: the mixer refuses its name or its options.
        """
        options = _options_of(name, self.mixers)
        if "causal" in options:
            raise ValueError(
                f"{name}.causal={options['causal']!r}: a decoder is causal, and two-sided mixers "
                f"would see the tokens they are to predict; leave it out"
            )
        return build(name, d_model=self.d_model, **options)

    def build_encoder_mixer(self, name: str) -> TokenMixer:
        """A new two-sided mixer with the options given for its name in the encoder.

        Raises:
            ValueError: the mixer refuses its name or its options, or has no two-sided form.
        """
        options = _options_of(name, self.encoder.mixers)
        if "causal" in options:
            raise ValueError(f"{name}.causal: an encoder's mixers are two-sided; leave it out")
        return build(name, d_model=self.d_model, causal=False, **options)

    def build_cross_attention(self) -> CrossAttention:
        """A new attention to the encoder's output.

        Raises:
            ValueError: an unknown option, or one that does not fit.
        """
        check_options("cross_attention", self.cross_attention, defaults_of(CrossAttention))
        return CrossAttention(self.d_model, **self.cross_attention)


def _options_of(name: str, mixers: dict[str, Any]) -> dict[str, Any]:
    options = mixers.get(name) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{name}={options!r} must be a mapping of options, {name}: {{...}}")
    return options
