"""Encoder that classifies whole sequences, over any two-sided token mixer.

Shapes: B examples, P sequences per example (1, or 2 to be compared), T time, D model width, V
vocabulary, C classes.

Sequences stand at the front of their rows and pads behind them: a CLS token before the first symbol
and positions counted from it would mean something else with pads in front.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pretrain.mixers import TokenMixer, build
from pretrain.models.block import Block, update_buffers
from pretrain.models.config import LayersConfig
from pretrain.models.layers import MLPS, RMSNorm, init_weights
from pretrain.models.pooling import mean_over_tokens
from pretrain.ops.relative_bias import share_t5_tables

POOLING = ("mean", "cls")


@dataclass
class EncoderConfig:
    """Everything that shapes the model.

    Attributes:
        n_classes: C.
        vocab_size: V; 0: the input is one real number per step, which a linear map lifts.
        n_inputs: P; of two the head sees both, their difference and their product.
        max_length: longest sequence with learned positions, CLS not counted; 0: no positions,
            of which most mixers have their own.
        pooling: "mean" over the symbols, or "cls", what a learned first token has become.
        d_model: model width.
        n_layers: number of layers; `layers` must agree.
        layers: the mixer of each layer.
        mixers: options by mixer name.
        mlp: "swiglu" or "gelu".
        d_ff: hidden width of the MLP; 0: 8/3 d_model rounded up to a multiple of 64.
        init_std: as in `LanguageModelConfig`.
    """

    n_classes: int = 2
    vocab_size: int = 256
    n_inputs: int = 1
    max_length: int = 0
    pooling: str = "mean"
    d_model: int = 128
    n_layers: int = 6
    layers: LayersConfig = field(default_factory=LayersConfig)
    mixers: dict[str, Any] = field(default_factory=dict)
    mlp: str = "swiglu"
    d_ff: int = 0
    init_std: float = 0.02

    def problems(self) -> list[str]:
        """Everything wrong with this config, one message each; empty when it can be built."""
        found = []
        for name, least in {"n_classes": 2, "d_model": 1, "n_layers": 1}.items():
            if getattr(self, name) < least:
                found.append(f"encoder.{name}={getattr(self, name)} must be at least {least}")
        for name in ("vocab_size", "max_length", "d_ff", "init_std"):
            if getattr(self, name) < 0:
                found.append(f"encoder.{name}={getattr(self, name)} must not be negative")
        if self.n_inputs not in (1, 2):
            found.append(f"encoder.n_inputs={self.n_inputs} must be 1 or 2")
        if self.pooling not in POOLING:
            found.append(f"encoder.pooling={self.pooling!r}: choose from {', '.join(POOLING)}")
        if self.mlp not in MLPS:
            found.append(f"encoder.mlp={self.mlp!r} is unknown: choose from {', '.join(MLPS)}")
        try:
            used = set(self.layers.names(self.n_layers))
        except ValueError as error:
            found.append(str(error))
            used = set()
        if self.d_model < 1:  # nothing can be built to look at
            return found
        for name in sorted(used | set(self.mixers)):
            try:
                with torch.device("meta"):
                    self.build_mixer(name)
            except ValueError as error:
                found.append(f"encoder.mixers: {error}")
        return found

    def build_mixer(self, name: str) -> TokenMixer:
        """A new two-sided mixer of this width with the options given for its name.

        Raises:
            ValueError: the mixer refuses its name or its options, or has no two-sided form.
        """
        options = self.mixers.get(name) or {}
        if "causal" in options:
            raise ValueError(f"{name}.causal: an encoder's mixers are two-sided; leave it out")
        return build(name, d_model=self.d_model, causal=False, **options)


class EncoderOutput(NamedTuple):
    """logits: (B, C). aux: "{layer_index}.{name}" -> what the mixers report, see `MixerOutput`."""

    logits: Tensor
    aux: dict[str, Tensor]


class Encoder(nn.Module):
    """Embedding or linear map, blocks, norm, pooling, head.

    Args:
        config: see `EncoderConfig`.

    Raises:
        ValueError: every problem of the config, at once.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if problems := config.problems():
            raise ValueError("\n".join(problems))
        self.config = config
        width = config.d_model
        d_ff = config.d_ff or 64 * math.ceil(8 * width / 3 / 64)
        self.embedding = nn.Embedding(config.vocab_size, width) if config.vocab_size else None
        self.input_proj = None if config.vocab_size else nn.Linear(1, width)
        self.positions = nn.Embedding(config.max_length, width) if config.max_length else None
        cls = config.init_std * torch.randn(width) if config.pooling == "cls" else None
        self.cls = None if cls is None else nn.Parameter(cls)
        self.blocks = nn.ModuleList(
            Block(name, config.build_mixer(name), d_model=width, d_ff=d_ff, mlp=config.mlp)
            for name in config.layers.names(config.n_layers)
        )
        self.norm = RMSNorm(width)
        if config.n_inputs == 1:
            self.head: nn.Module = nn.Linear(width, config.n_classes)
        else:
            self.head = nn.Sequential(
                nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, config.n_classes)
            )
        share_t5_tables(self)
        init_weights(self, config.init_std, config.n_layers)
        if self.input_proj is not None:  # like a row of the embedding at the input +-1
            nn.init.normal_(self.input_proj.bias, std=config.init_std)

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> EncoderOutput:
        """Classifies whole sequences; nothing behind a sequence's length has any influence.

        Args:
            inputs: (B, T), or (B, 2, T) with `n_inputs` 2; int64 symbols, or real numbers where
                `vocab_size` is 0.
            lengths: (B,) or (B, 2) int64, 1 .. T; None: all of T.

        Raises:
            ValueError: another number of sequences, or a T beyond the learned positions.
        """
        config = self.config
        shape = ("B", "T") if config.n_inputs == 1 else ("B", "2", "T")
        if inputs.ndim != len(shape) or (config.n_inputs == 2 and inputs.shape[1] != 2):
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)}: n_inputs={config.n_inputs} takes "
                f"({', '.join(shape)})"
            )
        pooled, aux = self._encode(
            inputs.reshape(-1, inputs.shape[-1]), None if lengths is None else lengths.reshape(-1)
        )
        if config.n_inputs == 2:
            one, other = pooled.unflatten(0, (-1, 2)).unbind(1)
            pooled = torch.cat([one, other, one - other, one * other], -1)
        return EncoderOutput(self.head(pooled), aux)

    def _encode(self, inputs: Tensor, lengths: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """(B P, T) and (B P,) -> (B P, D) and what the mixers report."""
        length = inputs.shape[1]
        if self.embedding is not None:
            x = self.embedding(inputs)
        else:
            assert self.input_proj is not None
            x = self.input_proj(inputs.to(self.input_proj.weight.dtype).unsqueeze(-1))
        if self.positions is not None:
            if length > self.positions.num_embeddings:
                raise ValueError(
                    f"sequences of {length} steps, but max_length={self.positions.num_embeddings} "
                    f"positions: raise it or shorten them"
                )
            x = x + self.positions.weight[:length]
        if self.cls is not None:
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], 1)
        padding = None
        if lengths is not None:
            ends = lengths + (self.cls is not None)
            padding = torch.arange(x.shape[1], device=x.device) >= ends.unsqueeze(1)
        added: Tensor | None = None
        aux: dict[str, Tensor] = {}
        for index, block in enumerate(self.blocks):
            output = block(x, padding=padding, added=added)
            x, added = output.x, output.added
            aux |= {f"{index}.{name}": value for name, value in output.aux.items()}
        if self.cls is not None:
            assert added is not None  # there is a layer
            return self.norm(x[:, 0], added[:, 0]), aux
        return mean_over_tokens(self.norm(x, added), padding), aux

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        """Hands each mixer its own share of summed `aux` statistics; once per optimizer step."""
        blocks = cast(list[Block], list(self.blocks))
        update_buffers([block.mixer for block in blocks], statistics)
