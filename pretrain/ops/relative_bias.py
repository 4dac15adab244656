"""Position biases of attention scores as functions of the distance alone.

Shapes: H heads, R distances, I queries, J keys.

A bias is handed to an attention op as one row per head over the distances 0 .. R - 1, and becomes a
matrix only there: a Toeplitz matrix is a reversed row read at every offset.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def t5_buckets(
    distance: Tensor, n_buckets: int = 32, max_distance: int = 128, *, causal: bool = True
) -> Tensor:
    """T5's bucket of each distance (Raffel et al. 2020, 1910.10683).

    One bucket per distance up to half of them, then logarithmically wider ones up to
    `max_distance`, beyond which all share the last.

    Args:
        distance: int64, any shape: query position minus key position.
        n_buckets: in total.
        max_distance: where the last bucket begins.
        causal: all buckets look back, and keys ahead share the bucket of distance 0; False: half of
            the buckets are for each side.
    """
    # In fp32 like T5's own code: some bucket edges lie on integers and rounding decides them.
    length = distance.float()
    if causal:
        side = torch.zeros_like(distance)
    else:
        n_buckets //= 2
        side, length = n_buckets * (distance < 0), length.abs()
    exact = n_buckets // 2
    far = torch.log(length.clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + far * (n_buckets - exact)).trunc().clamp(max=n_buckets - 1)
    # Keys ahead are clamped last: a clamp of an `arange` at 0, in fp32 too, becomes part of an
    # index that sympy cannot order where inductor fuses `torch.cat`, as it does on a GPU (torch
    # 2.11 and 2.13; pytorch/pytorch#172707).
    return side + torch.where(length < exact, length, far).long().clamp(min=0)


class T5Bias(nn.Module):
    """A learned scalar per head and bucket, this layer's own table.

    Args:
        n_heads: H.
        n_buckets: rows of the table.
        max_distance: where the last bucket begins.
        causal: False for distances on both sides, half of the buckets for each.
    """

    def __init__(
        self,
        n_heads: int,
        n_buckets: int = 32,
        max_distance: int = 128,
        *,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.n_buckets, self.max_distance, self.causal = n_buckets, max_distance, causal
        self.table = nn.Parameter(torch.zeros(n_heads, n_buckets))

    def forward(self, distances: Tensor) -> Tensor:
        """(R,) int64, query minus key -> (H, R)."""
        buckets = t5_buckets(distances, self.n_buckets, self.max_distance, causal=self.causal)
        return self.table[:, buckets]


class SharedT5Bias(T5Bias):
    """A model makes all of these with one number of heads read a single table."""


def share_t5_tables(model: nn.Module) -> None:
    """One table, that of the lowest layer, for all `SharedT5Bias` of the same shape."""
    tables: dict[torch.Size, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, SharedT5Bias):
            module.table = tables.setdefault(module.table.shape, module.table)


class RotaryBias(nn.Module):
    """MEGA's rotary bias: the inner product of one learned vector at i and another at j, rotated.

    Args:
        n_heads: H.
        width: of the vectors, even.
        base: of the rotary wavelengths.
    """

    def __init__(self, n_heads: int, width: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.base = base
        self.alpha = nn.Parameter(0.02 * torch.randn(n_heads, width))
        self.beta = nn.Parameter(0.02 * torch.randn(n_heads, width))

    def forward(self, distances: Tensor) -> Tensor:
        """(R,) int64 >= 0 -> (H, R)."""
        pairs = self.alpha.shape[1] // 2
        exponents = torch.arange(pairs, dtype=torch.float64, device=distances.device) / pairs
        # fp64: an angle at a distance of 2^20 is off by 0.04 rad in fp32.
        angles = torch.outer(self.base**-exponents, distances.double())
        cos, sin = angles.cos().to(self.alpha.dtype), angles.sin().to(self.alpha.dtype)
        (a, b), (c, d) = self.alpha.chunk(2, 1), self.beta.chunk(2, 1)
        return (a * c + b * d) @ cos + (a * d - b * c) @ sin


def toeplitz_bias(bias: Tensor, queries: int, keys: int, newest: int) -> Tensor:
    """The bias of each query and key.

    Args:
        bias: (H, R), R > `newest`.
        queries: I consecutive queries.
        keys: J consecutive keys.
        newest: distance from the last query to the first key.

    Returns:
        (H, I, J); entries of keys that lie ahead of their query mean nothing.
    """
    # Row i is the reversed bias from place I - 1 - i on; zeros stand for keys ahead of the query.
    ahead = max(0, queries + keys - 2 - newest)
    row = F.pad(bias[:, : newest + 1].flip(1), (0, ahead))
    return _Toeplitz.apply(row, queries, keys)


class _Toeplitz(torch.autograd.Function):
    """(H, L) -> (H, I, J): in line i what lies from place I - 1 - i on. The gradient of `unfold`
    adds entry after entry to the row, by atomics on a GPU; this one is a sum over lines."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, queries: int, keys: int) -> Tensor:
        ctx.length = row.shape[1]
        return row.unfold(1, keys, 1)[:, :queries].flip(1)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        return sums_of_diagonals(d, ctx.length), None, None


def sums_of_diagonals(x: Tensor, length: int) -> Tensor:
    """(..., I, J) -> (..., `length` >= I + J - 1): at p the sum of x[i, j], i - j = I - 1 - p."""
    lines, columns = x.shape[-2:]
    # Lines that are one entry longer than the result move to their places, each one further than
    # the one above it, when they are read as lines of its length.
    longer = F.pad(x.flip(-2), (0, length + 1 - columns)).flatten(-2)
    return longer[..., : lines * length].unflatten(-1, (lines, length)).sum(-2)
