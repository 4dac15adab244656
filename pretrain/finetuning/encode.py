"""Texts of a task as the tokens that a model reads and writes; cut only where that is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.tokenizer import Tokenizer
from pretrain.finetuning.interface import TrainableModel


@dataclass(frozen=True)
class Limits:
    """Tokens, EOS not counted.

    Attributes:
        input: longest input; 0: none.
        target: longest target; 0: none.
        truncate: cut off what is behind, instead of an error.
    """

    input: int = 0
    target: int = 0
    truncate: bool = False


def limits_of(model: TrainableModel, max_input: int, target: int, *, truncate: bool) -> Limits:
    """The limits that a model and the user set.

    Args:
        model: whose own limit may be lower.
        max_input: the user's, 0: none.
        target: longest target.
        truncate: see `Limits`.

    Raises:
        ValueError: the model takes no input beside the target.
    """
    both = [limit for limit in (max_input, model.longest_input(target)) if limit]
    return Limits(min(both, default=0), target, truncate)


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, limit: int, *, truncate: bool, what: str
) -> tuple[list[np.ndarray], int]:
    """Ids of each text, and how many texts were cut.

    Args:
        texts: to encode.
        tokenizer: the model's.
        limit: tokens of the longest; 0: none.
        truncate: cut off what is behind.
        what: "input of train" or so, for the error.

    Raises:
        ValueError: a text is longer than the limit and is not to be cut.
    """
    ids = [tokenizer.encode(text) for text in texts]
    long = [len(one) for one in ids if limit and len(one) > limit]
    if long and not truncate:
        key = what.split()[0]
        raise ValueError(
            f"{what}: {len(long):,} of {len(ids):,} have more than {limit:,} tokens, the longest "
            f"{max(long):,}; truncate=true cuts off their ends, max_{key}_tokens= and the model "
            f"set the limit"
        )
    return [one[:limit] if limit else one for one in ids], len(long)
