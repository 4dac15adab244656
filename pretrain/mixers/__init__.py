"""The registry of token mixers: an explicit table, one file per mixer."""

import difflib
import inspect
import math
from typing import Any

from pretrain.mixers.attention import Attention
from pretrain.mixers.base import MixerOutput, TokenMixer
from pretrain.mixers.block_recurrent import BlockRecurrent
from pretrain.mixers.bst import BlockStateTransformer
from pretrain.mixers.ema import EMA
from pretrain.mixers.fsat import FourierSparseAttention
from pretrain.mixers.gss import GatedStateSpace
from pretrain.mixers.longvq import LongVQ
from pretrain.mixers.mamba2 import Mamba2
from pretrain.mixers.mega import Mega
from pretrain.mixers.s4 import S4
from pretrain.mixers.s4d import S4D
from pretrain.mixers.s5 import S5
from pretrain.mixers.spade import Spade
from pretrain.mixers.swa import SlidingWindowAttention
from pretrain.mixers.transformer_ls import TransformerLS
from pretrain.mixers.transformer_xl import TransformerXL

MIXERS: dict[str, type[TokenMixer]] = {
    "transformer_xl": TransformerXL,
    "attention": Attention,
    "block_recurrent": BlockRecurrent,
    "bst": BlockStateTransformer,
    "ema": EMA,
    "fsat": FourierSparseAttention,
    "gss": GatedStateSpace,
    "longvq": LongVQ,
    "mamba2": Mamba2,
    "mega": Mega,
    "s4": S4,
    "s4d": S4D,
    "s5": S5,
    "spade": Spade,
    "swa": SlidingWindowAttention,
    "transformer_ls": TransformerLS,
}

__all__ = [
    "MIXERS",
    "MixerOutput",
    "TokenMixer",
    "build",
    "check_options",
    "defaults_of",
    "names",
    "options",
]


def names(*, causal: bool = True) -> list[str]:
    """The registered mixers that can be built so, sorted: for language models, or for encoders."""
    return sorted(
        name
        for name, mixer in MIXERS.items()
        if (not mixer.encoder_only if causal else mixer.two_sided)
    )


def options(name: str) -> dict[str, Any]:
    """The options of a mixer and their defaults; `causal` is the model's to say.

    Raises:
        ValueError: no such mixer.
    """
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}: {_suggest(name, sorted(MIXERS))}")
    return {key: value for key, value in defaults_of(MIXERS[name]).items() if key != "causal"}


def defaults_of(module: type) -> dict[str, Any]:
    """Keyword-only arguments of a constructor and their defaults: what a configuration may set."""
    return {
        key: parameter.default
        for key, parameter in inspect.signature(module).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def build(name: str, *, d_model: int, causal: bool = True, **mixer_options: Any) -> TokenMixer:
    """Builds a mixer by name.

    Args:
        name: a registered mixer.
        d_model: model width.
        causal: False for encoders; refused by mixers without a two-sided form.
        **mixer_options: the mixer's own options.

    Raises:
        ValueError: unknown name or option, an option of another type than its default, not finite
            or that the mixer refuses, no two-sided form.
    """
    check_options(name, mixer_options, options(name))
    if MIXERS[name].two_sided:
        return MIXERS[name](d_model, causal=causal, **mixer_options)
    if not causal:
        raise ValueError(
            f"causal=False: mixer {name!r} has no two-sided form, so it cannot serve an encoder"
        )
    return MIXERS[name](d_model, **mixer_options)


def check_options(name: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    """Compares options with the known ones and their defaults.

    Raises:
        ValueError: an unknown option, or one of another type than its default or not finite.
    """
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"unknown option {name}.{key}: {_suggest(key, sorted(known))}")
        if not _is_like(value, known[key]):
            raise ValueError(
                f"{name}.{key}={value!r} must be of type {type(known[key]).__name__}, like its "
                f"default {known[key]!r}, not {type(value).__name__}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}.{key}={value} must be finite")
        if key == "rotary_base" and value <= 1:
            raise ValueError(
                f"{name}.rotary_base={value} must be above 1: wavelengths grow by its powers"
            )


def _is_like(value: Any, default: Any) -> bool:
    """Of the default's type; an integer will do for a float, but a bool is no number."""
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
