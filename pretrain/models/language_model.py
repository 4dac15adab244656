"""Decoder language model over any pattern of token mixers.

Shapes: B batch, T time, D model width, V vocabulary, n reset-grid edges inside a call.

The head, with its loss, is a submodule: autocast and ZeRO-3 act only inside modules, and the
logits (B, T, V) of a training step never exist.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.mixers import TokenMixer
from pretrain.models.block import Block, update_buffers
from pretrain.models.config import LanguageModelConfig
from pretrain.models.layers import RMSNorm, TokenEmbedding, init_weights
from pretrain.ops.cross_entropy import CrossEntropy, linear_cross_entropy
from pretrain.ops.relative_bias import share_t5_tables


class ModelState(NamedTuple):
    """What the model carries from one segment of a document to the next: one state per layer."""

    layers: tuple[Any, ...]


class ModelOutput(NamedTuple):
    """What one forward gives.

    Attributes:
        loss_sum: scalar, at least fp32: sum of NLL in nats over counted targets; None without
            targets.
        hidden: (B, T, D), normed; `LanguageModel.logits` takes it.
        state: to be handed to the next call, a `ModelState` or `DecoderState`.
        aux: "{layer_index}.{name}" -> what the mixers report, see `MixerOutput`.
        nll: (B, T), at least fp32, 0 where masked, without gradient; None unless asked for.
    """

    loss_sum: Tensor | None
    hidden: Tensor
    state: Any
    aux: dict[str, Tensor]
    nll: Tensor | None = None


class LMHead(nn.Module):
    """Projection onto the vocabulary, with the loss inside."""

    def __init__(
        self, d_model: int, vocab_size: int, loss_chunk_size: int, *, scale_logits: bool = False
    ) -> None:
        super().__init__()
        self.loss_chunk_size = loss_chunk_size
        self.scale = d_model**-0.5 if scale_logits else 1.0
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, loss_mask: Tensor | None = None
    ) -> Tensor | CrossEntropy:
        """hidden (B, T, D) -> logits (B, T, V) or, with targets, the loss over B * T tokens."""
        if self.scale != 1:
            hidden = hidden * self.scale
        if targets is None:
            # Hidden states of an autocast forward are narrow, and the caller may have left it.
            wide = torch.promote_types(hidden.dtype, self.weight.dtype)
            return F.linear(hidden.to(wide), self.weight)
        if loss_mask is None:
            loss_mask = torch.ones_like(targets, dtype=torch.bool)
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            targets.flatten(),
            loss_mask.flatten(),
            chunk_size=self.loss_chunk_size,
        )


def head_of(config: LanguageModelConfig) -> LMHead:
    """A new head; tying it is the model's work."""
    return LMHead(
        config.d_model,
        config.vocab_size,
        config.loss_chunk_size,
        scale_logits=config.scale_logits,
    )


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head.

    Args:
        config: see `LanguageModelConfig`.

    Attributes:
        reset_grid: documents begin on multiples of this many tokens.
        constant_state: False when some layer's state grows with the context, or has none.
        longest_segment: 0, or the most tokens that layers without a recurrence take; see
            `TokenMixer`.

    Raises:
        ValueError: every problem of the config, at once.
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        problems = config.problems()
        if config.has_encoder:
            problems.append("model.encoder: this is an encoder-decoder, see `build_model`")
        if config.vocab_size == 0:
            problems.append("model.vocab_size=0: set it to the tokenizer's size")
        if problems:
            raise ValueError("\n".join(problems))
        self.config = config
        self.embedding = TokenEmbedding(
            config.vocab_size, config.d_model, residual_in_fp32=config.residual_in_fp32
        )
        self.dropout = nn.Dropout(config.dropout)
        blocks = [
            Block(
                name,
                config.build_mixer(name),
                d_model=config.d_model,
                d_ff=config.feed_forward_size,
                mlp=config.mlp,
                dropout=config.dropout,
            )
            for name in config.layer_names()
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.d_model)
        self.head = head_of(config)
        if config.tie_embeddings:
            # One Parameter in two modules, which is what ZeRO-3 understands.
            self.head.weight = cast(nn.Parameter, self.embedding.weight)
        share_t5_tables(self)
        layers = self._mixers()
        self.reset_grid = config.common_grid(layer.block_size for layer in layers)
        for layer in layers:
            layer.reset_grid = self.reset_grid
        self.constant_state = all(layer.constant_state for layer in layers)
        limits = [layer.longest_segment for layer in layers if layer.longest_segment]
        self.longest_segment = min(limits, default=0)
        init_weights(self, config.init_std, config.n_layers, tables=(nn.Embedding, LMHead))

    def named_mixers(self) -> dict[str, TokenMixer]:
        """Mixers by "{layer_index}.{mixer_name}", bottom first."""
        return {f"{i}.{block.kind}": block.mixer for i, block in enumerate(self._blocks())}

    def _mixers(self) -> list[TokenMixer]:
        return [block.mixer for block in self._blocks()]

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        resets: Tensor | None = None,
        targets: Tensor | None = None,
        loss_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> ModelOutput:
        """Runs a segment; any split of a document with the state handed on gives the same.

        Args:
            tokens: (B, T) int64.
            state: of the previous segment; None at the start of documents.
            resets: (B, n) bool, one flag per edge of the reset grid inside this segment, True where
                a document begins; None when none does.
            targets: (B, T) int64, the next tokens.
            loss_mask: (B, T) bool, True where the target counts; None: everywhere.
            per_token: also return the NLL of every token.
        """
        x, added = self.dropout(self.embedding(tokens)), None
        states: list[Any] = []
        aux: dict[str, Tensor] = {}
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        for index, block in enumerate(self.blocks):
            before = None if state is None else state.layers[index]
            if recompute:  # what a block is given is kept: one tensor instead of two
                output = checkpoint(block, x, before, resets, loss_mask, use_reentrant=False)
                x = output.stream
            else:
                output = block(x, before, resets, loss_mask, added=added)
                x, added = output.x, output.added
            states.append(output.state)
            aux |= {f"{index}.{name}": value for name, value in output.aux.items()}
        hidden = self.norm(x, added)
        after = ModelState(tuple(states))
        if targets is None:
            return ModelOutput(None, hidden, after, aux)
        loss_sum, nll = self.head(hidden, targets, loss_mask)
        return ModelOutput(
            loss_sum, hidden, after, aux, nll.view_as(targets) if per_token else None
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V); for generation and short evaluations, not for training."""
        return self.head(hidden)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ModelState:
        """The state before the first token; `dtype` is that of cached keys and values."""
        device = torch.device(device)
        return ModelState(
            tuple(
                mixer.init_state(batch_size, device=device, dtype=dtype) for mixer in self._mixers()
            )
        )

    def update_buffers(self, statistics: dict[str, Tensor]) -> None:
        """Hands each mixer its own share of summed `aux` statistics; once per optimizer step."""
        update_buffers(self._mixers(), statistics)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by layer kind; the values sum to the model's size. A parameter that several
        layers share, or a tied head, counts where it is first met."""
        counted: set[int] = set()

        def size(*modules: nn.Module) -> int:
            new = {id(p): p.numel() for module in modules for p in module.parameters()}
            total = sum(numel for key, numel in new.items() if key not in counted)
            counted.update(new)
            return total

        counts: dict[str, int] = {"embedding": size(self.embedding)}
        for block in self._blocks():
            counts[block.kind] = counts.get(block.kind, 0) + size(block.mixer)
        counts["mlp"] = size(*(block.mlp for block in self._blocks()))
        norms = [norm for block in self._blocks() for norm in (block.mixer_norm, block.mlp_norm)]
        counts["norm"] = size(*norms, self.norm)
        counts["head"] = size(self.head)
        return counts

    def flops_per_token(self, seq_len: int) -> dict[str, float]:
        """Forward FLOPs per token by layer kind, at documents of `seq_len` tokens.

        Convention: 2 per multiply-add of weights (not of embedding look-ups), 4 D per visible key
        of attention, the useful half of the SSM's Toeplitz product; nothing for norms, softmax and
        recomputation. A training step is three times this.
        """
        flops: dict[str, float] = {}
        for block in self._blocks():
            cost = block.mixer.flops_per_token(seq_len)
            flops[block.kind] = flops.get(block.kind, 0.0) + cost
        flops["mlp"] = 2.0 * sum(_size(block.mlp) for block in self._blocks())
        flops["head"] = 2.0 * self.config.d_model * self.config.vocab_size
        return flops


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
