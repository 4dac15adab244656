"""Token sequences of different lengths as one tensor, and on the model's device.

Shapes: B sequences, T tokens of the longest, rounded up.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import PAD_ID

PAD_MULTIPLE = 16  # few different shapes


def padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(B, T) int64, PAD behind each row; and (B, T) bool, where no PAD is. Both on the CPU."""
    lengths = np.array([len(row) for row in rows])
    width = -(-int(lengths.max()) // PAD_MULTIPLE) * PAD_MULTIPLE
    tokens = np.full((len(rows), width), PAD_ID, np.int64)
    for lane, row in enumerate(rows):
        tokens[lane, : len(row)] = row
    return torch.from_numpy(tokens), torch.from_numpy(np.arange(width) < lengths[:, None])


def room_for_input(limit: int, target_tokens: int = 0) -> int:
    """Tokens of the longest input beside START, EOS and a target, where `padded` makes the row no
    longer than a model's limit.

    Raises:
        ValueError: there is no room for any.
    """
    room = limit // PAD_MULTIPLE * PAD_MULTIPLE - 2 - target_tokens
    if room < 1:
        cut = "lower max_target_tokens= with truncate=true, or " if target_tokens else ""
        raise ValueError(
            f"targets of {target_tokens:,} tokens leave no room for an input: the model takes "
            f"{limit:,} tokens (train_length of its layers), START, EOS and padding to a multiple "
            f"of {PAD_MULTIPLE} among them; {cut}choose a model that takes more"
        )
    return room


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there; the host does not wait for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from pageable memory it would
    return tensor.to(device, non_blocking=True)
