"""Encoder-decoder: an encoder over any two-sided mixers and a causal decoder that reads it.

    encoder layer   x = x + mixer(norm(x));  x = x + mlp(norm(x))                     two-sided
    decoder layer   x = x + mixer(norm(x));  x = x + cross(norm(x), memory);  x = x + mlp(norm(x))

Shapes: B batch, S encoder tokens, T decoder tokens, D model width, V vocabulary, H heads, K head
width. Layers are counted through, the encoder's first: in `aux`, in tables and in health.

SPADE's (Zuo et al. 2022, 2212.08136) is one choice of mixers: encoder layer 0 `spade`, the others
`swa`, the decoder `attention`. With `attention` everywhere, T5's bias and unscaled scores it is T5
(Raffel et al. 2020, 1910.10683), up to where dropout is.
"""

from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.mixers.base import TokenMixer
from pretrain.models.block import Block, BlockOutput, update_buffers
from pretrain.models.config import LanguageModelConfig
from pretrain.models.cross_attention import CrossAttention, KeysValues
from pretrain.models.language_model import LMHead, ModelOutput, head_of
from pretrain.models.layers import RMSNorm, TokenEmbedding, init_weights
from pretrain.ops.relative_bias import share_t5_tables

# T5's span corruption has 114 targets for 512 encoder tokens, and so on in proportion.
SPAN_TARGETS = 114 / 512


class DecoderBlock(Block):
    """A `Block` with attention to the encoder between its mixer and its MLP.

    Args:
        kind: name of the mixer, for tables.
        mixer: the causal token mixer.
        cross: the attention to the encoder.
        d_model: model width.
        d_ff: hidden width of the MLP.
        mlp: a name of `MLPS`.
        dropout: of what is added to the residual stream.
    """

    reads_memory = True

    def __init__(
        self,
        kind: str,
        mixer: TokenMixer,
        cross: CrossAttention,
        *,
        d_model: int,
        d_ff: int,
        mlp: str,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(kind, mixer, d_model=d_model, d_ff=d_ff, mlp=mlp, dropout=dropout)
        self.cross_norm = RMSNorm(d_model)
        self.cross = cross

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        resets: Tensor | None = None,
        counted: Tensor | None = None,
        padding: Tensor | None = None,
        memory: Tensor | KeysValues | None = None,
        *,
        added: Tensor | None = None,
    ) -> BlockOutput:
        """x and added (B, T, D); memory and padding (B, S) bool as in `CrossAttention.forward`."""
        assert memory is not None
        x, state, aux = self.mix(x, added, state, resets, counted)
        x = x + self.dropout(self.cross(self.cross_norm(x), memory, padding))
        return BlockOutput(x, self.dropout(self.mlp(self.mlp_norm(x))), state, aux)


class DecoderState(NamedTuple):
    """What decoding goes on from; batch first, so that lanes can be chosen with `index_state`.

    Attributes:
        layers: state of each decoder layer, of constant size where its mixer's is; None before the
            first token.
        memory: for each decoder layer its keys and values of the encoder, or, as training has it,
            the encoder's output (B, S, D) itself.
        padding: (B, S) bool, True where the encoder has no token; None: nowhere.
    """

    layers: tuple[Any, ...]
    memory: tuple[KeysValues | Tensor, ...]
    padding: Tensor | None


class EncoderDecoder(nn.Module):
    """Embedding, encoder, decoder, head; one embedding for both sides.

    Args:
        config: see `LanguageModelConfig`; with an encoder.

    Attributes:
        reset_grid: of the decoder's layers; targets need no resets.
        constant_state: whether all of the decoder's states are of constant size.
        longest_segment: 0, or the most tokens that the decoder takes; see `TokenMixer`.

    Raises:
        ValueError: every problem of the config, at once.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        problems = config.problems()
        if not config.has_encoder:
            problems.append("model.encoder.n_layers=0: an encoder-decoder has encoder layers")
        if config.vocab_size == 0:
            problems.append("model.vocab_size=0: set it to the tokenizer's size")
        if problems:
            raise ValueError("\n".join(problems))
        self.config = config
        sizes: dict[str, Any] = {
            "d_model": config.d_model,
            "d_ff": config.feed_forward_size,
            "mlp": config.mlp,
            "dropout": config.dropout,
        }
        self.embedding = TokenEmbedding(
            config.vocab_size, config.d_model, residual_in_fp32=config.residual_in_fp32
        )
        self.dropout = nn.Dropout(config.dropout)
        self.encoder_blocks = nn.ModuleList(
            Block(name, config.build_encoder_mixer(name), **sizes)
            for name in config.encoder_layer_names()
        )
        self.encoder_norm = RMSNorm(config.d_model)
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(name, config.build_mixer(name), config.build_cross_attention(), **sizes)
            for name in config.layer_names()
        )
        self.norm = RMSNorm(config.d_model)
        self.head = head_of(config)
        if config.tie_embeddings:
            # One Parameter in two modules, which is what ZeRO-3 understands.
            self.head.weight = cast(nn.Parameter, self.embedding.weight)
        # A table of distances to both sides is none of distances to the past.
        share_t5_tables(self.encoder_blocks)
        share_t5_tables(self.decoder_blocks)
        mixers = [block.mixer for block in self._decoder()]
        self.reset_grid = config.common_grid(mixer.block_size for mixer in mixers)
        for mixer in mixers:
            mixer.reset_grid = self.reset_grid
        self.constant_state = all(mixer.constant_state for mixer in mixers)
        limits = [mixer.longest_segment for mixer in mixers if mixer.longest_segment]
        self.longest_segment = min(limits, default=0)
        std = config.init_std
        init_weights(self.embedding, std, 1)
        init_weights(self.encoder_blocks, std, config.encoder.n_layers)
        init_weights(self.decoder_blocks, std, 1.5 * config.n_layers)
        if not config.tie_embeddings:
            init_weights(self.head, std, 1, tables=(LMHead,))

    @property
    def blocks(self) -> list[Block]:
        """All layers, the encoder's first."""
        return [*self._encoder(), *self._decoder()]

    def named_mixers(self) -> dict[str, TokenMixer]:
        """Mixers by "{layer_index}.{mixer_name}", the encoder's first."""
        return {f"{i}.{block.kind}": block.mixer for i, block in enumerate(self.blocks)}

    def _encoder(self) -> list[Block]:
        return cast(list[Block], list(self.encoder_blocks))

    def _decoder(self) -> list[DecoderBlock]:
        return cast(list[DecoderBlock], list(self.decoder_blocks))

    def forward(
        self,
        tokens: Tensor,
        state: DecoderState | None = None,
        *,
        encoder_tokens: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> ModelOutput:
        """Runs the decoder on an input that is read here, or goes on from a state.

        Args:
            tokens: (B, T) int64, the decoder's input.
            state: of `start` or of the previous call; None: `encoder_tokens` are given.
            encoder_tokens: (B, S) int64.
            encoder_mask: (B, S) bool, True where a token stands; None: everywhere.
            targets: (B, T) int64, the next tokens.
            loss_mask: (B, T) bool, True where the target counts; None: everywhere.
            per_token: also return the NLL of every token.

        Raises:
            ValueError: both or neither of a state and encoder tokens.
        """
        if (state is None) == (encoder_tokens is None):
            raise ValueError(
                "give either encoder_tokens, to read an input, or the state of one that was read"
            )
        aux: dict[str, Tensor] = {}
        if state is None:
            assert encoder_tokens is not None
            memory, aux = self.encode(encoder_tokens, encoder_mask)
            fresh = (None,) * self.config.n_layers
            padding = None if encoder_mask is None else ~encoder_mask
            state = DecoderState(fresh, (memory,) * self.config.n_layers, padding)
        x, added, states = self.dropout(self.embedding(tokens)), None, []
        for index, block in enumerate(self._decoder()):
            layer = state.layers[index], None, loss_mask, state.padding, state.memory[index]
            output, x, added = self._run(block, x, added, *layer)
            states.append(output.state)
            number = self.config.encoder.n_layers + index
            aux |= {f"{number}.{name}": value for name, value in output.aux.items()}
        hidden = self.norm(x, added)
        after = state._replace(layers=tuple(states))
        if targets is None:
            return ModelOutput(None, hidden, after, aux)
        loss_sum, nll = self.head(hidden, targets, loss_mask)
        return ModelOutput(
            loss_sum, hidden, after, aux, nll.view_as(targets) if per_token else None
        )

    def encode(
        self, encoder_tokens: Tensor, encoder_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reads an input.

        Args:
            encoder_tokens: (B, S) int64.
            encoder_mask: (B, S) bool, True where a token stands; None: everywhere.

        Returns:
            (B, S, D), normed; it means nothing where no token stands. And what the mixers report.
        """
        x, added, padding = self.dropout(self.embedding(encoder_tokens)), None, None
        if encoder_mask is not None:
            padding = ~encoder_mask
        aux: dict[str, Tensor] = {}
        for index, block in enumerate(self._encoder()):
            output, x, added = self._run(block, x, added, None, None, encoder_mask, padding)
            aux |= {f"{index}.{name}": value for name, value in output.aux.items()}
        return self.encoder_norm(x, added), aux

    def start(self, encoder_tokens: Tensor, encoder_mask: Tensor | None = None) -> DecoderState:
        """Reads an input for generation: each layer's keys and values of it are made once.

        Arguments of `encode`.
        """
        memory, _ = self.encode(encoder_tokens, encoder_mask)
        read = tuple(block.cross.keys_values(memory) for block in self._decoder())
        padding = None if encoder_mask is None else ~encoder_mask
        return DecoderState((None,) * self.config.n_layers, read, padding)

    def _run(
        self, block: Block, x: Tensor, added: Tensor | None, *arguments: Any
    ) -> tuple[BlockOutput, Tensor, Tensor | None]:
        """A layer's output, and `x` and `added` for the next."""
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            # What a block is given is kept: one tensor instead of two.
            output = checkpoint(block, x, *arguments, use_reentrant=False)
            return output, output.stream, None
        output = block(x, *arguments, added=added)
        return output, output.x, output.added

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V); for generation and short evaluations, not for training."""
        return self.head(hidden)

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        """Hands each mixer its own share of summed `aux` statistics; once per optimizer step."""
        update_buffers([block.mixer for block in self.blocks], statistics)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by layer kind; the values sum to the model's size. A parameter that several
        layers share, or a tied head, counts where it is first met."""
        parts: list[tuple[str, nn.Module]] = [("embedding", self.embedding)]
        parts += [(f"encoder {block.kind}", block.mixer) for block in self._encoder()]
        parts += [(f"decoder {block.kind}", block.mixer) for block in self._decoder()]
        parts += [("cross attention", block.cross) for block in self._decoder()]
        parts += [("mlp", block.mlp) for block in self.blocks]
        norms = ((block.mixer_norm, block.mlp_norm) for block in self.blocks)
        parts += [("norm", norm) for norm in chain(*norms)]
        parts += [("norm", block.cross_norm) for block in self._decoder()]
        parts += [("norm", self.encoder_norm), ("norm", self.norm), ("head", self.head)]
        counts: dict[str, int] = {}
        counted: set[int] = set()
        for kind, module in parts:
            new = {id(p): p.numel() for p in module.parameters() if id(p) not in counted}
            counts[kind] = counts.get(kind, 0) + sum(new.values())
            counted.update(new)
        return counts

    def flops_per_token(self, seq_len: int, target_len: int = 0) -> dict[str, float]:
        """Forward FLOPs by layer kind *per encoder token*: the decoder's are spread over them.

        The convention is that of `LanguageModel.flops_per_token`.

        Args:
            seq_len: S.
            target_len: T, padding included; 0: what T5's span corruption makes of S.
        """
        target_len = target_len or max(1, round(SPAN_TARGETS * seq_len))
        share = target_len / seq_len  # decoder tokens per encoder token
        flops: dict[str, float] = {}
        for block in self._encoder():
            kind = f"encoder {block.kind}"
            flops[kind] = flops.get(kind, 0.0) + block.mixer.flops_per_token(seq_len)
        for block in self._decoder():
            kind = f"decoder {block.kind}"
            cost = share * block.mixer.flops_per_token(target_len)
            flops[kind] = flops.get(kind, 0.0) + cost
        crosses = [block.cross.flops(seq_len, target_len) for block in self._decoder()]
        flops["cross attention"] = sum(crosses) / seq_len
        mlp = sum(parameter.numel() for parameter in self._decoder()[0].mlp.parameters())
        flops["mlp"] = 2.0 * mlp * (len(self._encoder()) + share * len(self._decoder()))
        flops["head"] = 2.0 * share * self.config.d_model * self.config.vocab_size
        return flops
