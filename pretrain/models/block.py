"""One layer: mix along the sequence, then mix channels, each with its norm and residual.

    x = x + mixer(norm(x))        or  x + gate * (mixer(norm(x)) - x)  where the mixer has a gate
    x = x + mlp(norm(x))

Shapes: B batch, T time, D model width. The block owns norms and residuals; mixers add nothing.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from pretrain.mixers.base import TokenMixer
from pretrain.models.layers import MLPS, RMSNorm


class BlockOutput(NamedTuple):
    """x: (B, T, D). state and aux: the mixer's."""

    x: Tensor
    state: Any
    aux: dict[str, Tensor]


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
    ) -> BlockOutput:
        """x (B, T, D); state and resets as in `TokenMixer.forward`; counted (B, T) bool; padding
        (B, T) bool, for encoders."""
        x, state, aux = self.mix(x, state, resets, counted, padding)
        return BlockOutput(x + self.dropout(self.mlp(self.mlp_norm(x))), state, aux)

    def mix(
        self,
        x: Tensor,
        state: Any,
        resets: Tensor | None,
        counted: Tensor | None,
        padding: Tensor | None = None,
    ) -> BlockOutput:
        """The first half of `forward`."""
        extra = {"counted": counted} if self.mixer.takes_counted else {}
        if padding is not None:
            extra["padding"] = padding
        mixed = self.mixer(self.mixer_norm(x), state, resets=resets, **extra)
        x = x + self.dropout(mixed.y if mixed.gate is None else mixed.gate * (mixed.y - x))
        kept = mixed.state if self.keeps_state or not self.training else None
        return BlockOutput(x, kept, mixed.aux)


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
