"""A sequence as one vector.

Shapes: B sequences, T time, D model width.
"""

import torch
from torch import Tensor


def mean_over_tokens(x: Tensor, padding: Tensor | None = None) -> Tensor:
    """x (B, T, D) -> (B, D), at least fp32: the mean over each row's tokens.

    Args:
        x: of any kind of float; pads may hold anything.
        padding: (B, T) bool, True where no token stands; each row has some token. None: nowhere.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if padding is None:
        return x.mean(1)
    # Masked, not multiplied by zero, which an infinity would survive.
    total = x.masked_fill(padding.unsqueeze(-1), 0).sum(1)
    return total / (~padding).sum(1, keepdim=True)
