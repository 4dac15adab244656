"""One layer: mix along the sequence, then mix channels, each with its norm and residual.

    x = x + mixer(norm(x))        or  x + gate * (mixer(norm(x)) - x)  where the mixer has a gate
    x = x + mlp(norm(x))

The last addition is the next block's (see `BlockOutput`).

Shapes: B batch, T time, D model width. The block owns norms and residuals; mixers add nothing.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from pretrain.mixers.base import TokenMixer
from pretrain.models.layers import MLPS, RMSNorm


class BlockOutput(NamedTuple):
    """The residual stream in two parts, and what the mixer gives.

    What the MLP adds is left to the next block, or to the norm behind the last one: there the sum
    is formed in the pass that norms it, and the stream is written and read once less per layer.

    Attributes:
        x: (B, T, D), the stream before the MLP.
        added: (B, T, D), the MLP's part.
        state: the mixer's.
        aux: the mixer's.
    """

    x: Tensor
    added: Tensor
    state: Any
    aux: dict[str, Tensor]

    @property
    def stream(self) -> Tensor:
        """(B, T, D), the sum."""
        return self.x + self.added


class Block(nn.Module):
    """A token mixer and an MLP around the residual stream.

    Args:
        kind: name of the mixer, for tables.
        mixer: the token mixer.
        d_model: model width.
        d_ff: hidden width of the MLP.
        mlp: a name of `MLPS`.
        dropout: of what is added to the residual stream.

    Attributes:
        reads_memory: True where forward takes `memory`, an encoder's output.
        keeps_state: False where nothing carries states in training: none is returned there, and a
            compiler leaves out what only a state needs. In evaluation there always is one.
    """

    reads_memory: ClassVar[bool] = False
    keeps_state: bool = True

    def __init__(
        self,
        kind: str,
        mixer: TokenMixer,
        *,
        d_model: int,
        d_ff: int,
        mlp: str,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.mixer_norm = RMSNorm(d_model)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(d_model)
        self.mlp = MLPS[mlp](d_model, d_ff)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        resets: Tensor | None = None,
        counted: Tensor | None = None,
        padding: Tensor | None = None,
        *,
        added: Tensor | None = None,
    ) -> BlockOutput:
        """One layer.

        Args:
            x: (B, T, D).
            state: as in `TokenMixer.forward`.
            resets: likewise.
            counted: (B, T) bool.
            padding: (B, T) bool, for encoders.
            added: (B, T, D), what the block before has left to be added to `x`.
        """
        x, state, aux = self.mix(x, added, state, resets, counted, padding)
        return BlockOutput(x, self.dropout(self.mlp(self.mlp_norm(x))), state, aux)

    def mix(
        self,
        x: Tensor,
        added: Tensor | None,
        state: Any,
        resets: Tensor | None,
        counted: Tensor | None,
        padding: Tensor | None = None,
    ) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """The first half of `forward`: the stream, the mixer's state and its aux."""
        extra = {"counted": counted} if self.mixer.takes_counted else {}
        if padding is not None:
            extra["padding"] = padding
        x = x if added is None else x + added
        mixed = self.mixer(self.mixer_norm(x), state, resets=resets, **extra)
        x = x + self.dropout(mixed.y if mixed.gate is None else mixed.gate * (mixed.y - x))
        kept = mixed.state if self.keeps_state or not self.training else None
        return x, kept, mixed.aux


def keep_states(model: nn.Module, keep: bool) -> None:
    """Sets `Block.keeps_state` of all blocks in `model`."""
    for module in model.modules():
        if isinstance(module, Block):
            module.keeps_state = keep


def update_buffers(layers: Sequence[TokenMixer], statistics: dict[str, Tensor]) -> None:
    """Hands each layer its share of summed `aux` statistics, "{layer_index}.{name}"."""
    by_layer: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in statistics.items():
        index, name = key.split(".", 1)
        by_layer[int(index)][name] = value
    for layer, share in by_layer.items():
        layers[layer].update_buffers(share)
