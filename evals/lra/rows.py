"""The encoders of the LRA table: six layers of width 128, all of one size to 1 %.

Windows and blocks are 32 tokens, to both sides: six layers of windows alone see 6 x 31 = 186 tokens
away, and the pooling is all that joins what they saw. The MLPs' width makes up for what a mixer has
fewer or more of than `swa`. State-space layers start from their own defaults, moving averages from
longer memories. Only mixers with a two-sided form are here: a BST has none.
"""

from dataclasses import dataclass
from typing import Any

from evals.lra.tasks import Task
from pretrain.models import EncoderConfig, LayersConfig

D_MODEL, N_LAYERS, WINDOW = 128, 6, 32


@dataclass(frozen=True)
class Row:
    """An encoder: its layers, the options of their mixers, the hidden width of its MLPs."""

    layers: LayersConfig
    mixers: dict[str, dict[str, Any]]
    d_ff: int

    def config(self, task: Task) -> EncoderConfig:
        return EncoderConfig(
            n_classes=task.n_classes,
            vocab_size=task.vocab_size,
            n_inputs=task.n_inputs,
            d_model=D_MODEL,
            n_layers=N_LAYERS,
            layers=self.layers,
            mixers=self.mixers,
            d_ff=self.d_ff,
        )


_SSM = {"n_modes": 16, "chunk_size": 64}
_SWA = {"n_heads": 4, "window_size": WINDOW, "qk_norm": True}
_SPADE = _SWA | {"n_modes": 16, "chunk_size": WINDOW}
_LONGVQ = {"block_size": WINDOW, "chunk_size": WINDOW, "n_codes": 128, "d_shared": 64}


def _pure(name: str, options: dict[str, Any], d_ff: int) -> Row:
    return Row(LayersConfig(default=name), {name: options}, d_ff)


ROWS: dict[str, Row] = {
    "attention": _pure("attention", {"n_heads": 4, "qk_norm": True}, 256),
    "swa": _pure("swa", _SWA, 256),
    "spade": Row(LayersConfig(default="swa", at={0: "spade"}), {"swa": _SWA, "spade": _SPADE}, 240),
    "s4": _pure("s4", _SSM, 288),
    "s4d": _pure("s4d", _SSM, 312),
    "s5": _pure("s5", {"n_modes": 64, "chunk_size": 32}, 216),
    "ema": _pure("ema", _SSM | {"longest_memory": 2048.0}, 296),
    "longvq": _pure("longvq", _LONGVQ | {"d_value": 128, "n_modes": 16}, 160),
    "fsat": _pure("fsat", {"n_heads": 4, "n_places": 16}, 192),
}
