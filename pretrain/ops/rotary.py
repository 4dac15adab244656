"""Rotary position embedding (Su et al. 2021, 2104.09864), half-split layout.

Scores depend on differences of positions only, so callers count positions from the start of what
they hold and never from the start of a stream. Angles are formed in fp64 all the same: in fp32 an
angle at 2^20 is off by 0.04 rad, which would show up as a false loss at long context.
"""

import torch
from torch import Tensor

from pretrain.ops.numerics import no_autocast, wide_dtype


def rotate(*tensors: Tensor, start: int, base: float = 10_000.0) -> tuple[Tensor, ...]:
    """Rotates tensors (B, T, H, K) whose first token has position `start`."""
    length, head_dim = tensors[0].shape[1], tensors[0].shape[3]
    device = tensors[0].device
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base**-exponents).unsqueeze(1)
    with no_autocast(tensors[0]):
        cos, sin = (f(angles).to(wide_dtype(tensors[0])) for f in (torch.cos, torch.sin))
        return tuple(_apply(x, cos, sin) for x in tensors)


def _apply(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.to(x.dtype)
