"""T5's relative positions: one learned score per head and bucket of distances.

Raffel et al. 2020 (1910.10683); 32 buckets, half of them exact, the rest logarithmic up to 128
tokens, beyond which every distance looks alike: that is why such a model can be read at lengths it
never saw, and why it cannot tell 200 tokens from 2,000.

Shapes: H heads, R distances.
"""

import math

import torch
from torch import Tensor, nn


def t5_buckets(
    distance: Tensor, *, causal: bool = True, n_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """The bucket of each distance.

    Args:
        distance: int64, any shape: query position minus key position.
        causal: all buckets are for the past and the future shares bucket 0; False: half of the
            buckets are for each side.
        n_buckets: in total.
        max_distance: where the last bucket begins.

    Returns:
        int64, like `distance`.
    """
    if causal:
        side, distance = torch.zeros_like(distance), distance.clamp(min=0)
    else:
        n_buckets //= 2
        side, distance = n_buckets * (distance < 0), distance.abs()
    exact = n_buckets // 2
    # In fp32 like T5's own code: some bucket edges lie on integers and rounding decides them.
    octaves = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (octaves * (n_buckets - exact)).long()
    return side + torch.where(distance < exact, distance, far.clamp(max=n_buckets - 1))


class T5RelativeBias(nn.Module):
    """The table (32, H). A language model makes all tables of one shape a single Parameter."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.table = nn.Embedding(32, n_heads)

    def forward(self, reach: int) -> Tensor:
        """What is added to the scores of keys 0 .. reach - 1 tokens back, (H, reach)."""
        return self.table(t5_buckets(torch.arange(reach, device=self.table.weight.device))).T
