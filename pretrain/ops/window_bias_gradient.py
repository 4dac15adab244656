"""The gradient of a bias by distance, of attention to windows whose kernel does not give it.

Shapes: B batch, T queries, M cached keys in front of them, H heads, K head width, R distances, W
window or block size.

FlexAttention adds the gradient of every score to the place that its bias was read from: by atomics,
of which a window of 512 tokens makes 512 per token and head, all into the same 512 places. They
take 60 ms and more where all else of the backward takes 2 (H100, 65,536 tokens, d_model 1,024).
Here the bias is no input of that kernel, and `with_bias_gradient` adds what it owes:

    d bias[h, r] = sum over b, i of P (dP - delta) at the key r back from i,   P = exp(S - lse)

A tile of scores d tiles below the diagonal holds the same distances wherever it lies, so that tiles
are summed over queries and batch first, and diagonals of these sums once at the end; no atomics.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.relative_bias import sums_of_diagonals


class Pairs(NamedTuple):
    """Which keys a query sees.

    reach: as in `window_attention`, or "symmetric": less than W tokens away on either side.
    block_size: W.
    cached: M.
    offset: as in `window_attention`.
    """

    reach: str
    block_size: int
    cached: int = 0
    offset: int = 0

    @property
    def first_distance(self) -> int:
        """The distance, query minus key, at place 0 of a bias."""
        return 1 - self.block_size if self.reach == "symmetric" else 0


def with_bias_gradient(
    y: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    marks: Tensor | None,
    pairs: Pairs,
    scale: float | None,
) -> Tensor:
    """`y` itself; its gradient goes on to `bias`, too.

    Args:
        y: (B, T, H, K), the attention's output, which `bias` had a part in as a constant.
        bias: (H, R) fp32.
        q: (B, T, H, K).
        k: (B, M + T, H, K).
        v: like `k`.
        lse: (B, H, T) fp32, the logarithm of the sum of each query's exponentials.
        marks: (B, at least M + T) int32; queries see keys of the same mark, or, with
            reach="symmetric", themselves and those of mark 0. None: all are the same.
        pairs: what hides keys besides.
        scale: of the scores; None: 1 / sqrt(K).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    fixed = (x.detach() for x in (q, k, v, lse))
    return _WithBiasGradient.apply(y, bias, *fixed, marks, pairs, scale)


class _WithBiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        bias: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        marks: Tensor | None,
        pairs: Pairs,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(y, bias, q, k, v, lse, marks)
        ctx.pairs, ctx.scale = pairs, scale
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor):
        y, bias, q, k, v, lse, marks = ctx.saved_tensors
        delta = (d_y.float() * y.float()).sum(-1)
        inputs = d_y, delta, bias, q, k, v, lse, marks
        return d_y, window_bias_gradient(*inputs, *ctx.pairs, ctx.scale), *[None] * 7


@torch.library.custom_op("longspan::window_bias_gradient", mutates_args=())
def window_bias_gradient(
    d_y: Tensor,
    delta: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    marks: Tensor | None,
    reach: str,
    block_size: int,
    cached: int,
    offset: int,
    scale: float,
) -> Tensor:
    """The gradient of a bias by distance, by the kernel.

    Args:
        d_y: (B, T, H, K), of the output.
        delta: (B, T, H) fp32, the products of `d_y` and the output, summed over K.
        bias: as in `with_bias_gradient`.
        q: likewise.
        k: likewise.
        v: likewise.
        lse: likewise.
        marks: likewise.
        reach: as in `Pairs`.
        block_size: likewise.
        cached: likewise.
        offset: likewise.
        scale: of the scores.

    Returns:
        (H, R) like `bias`.
    """
    from pretrain.ops.window_bias_kernel import tile_size, tiles_of_gradients

    pairs, tile = Pairs(reach, block_size, cached, offset), tile_size(q)
    lowest = pairs.first_distance
    highest = min(lowest + bias.shape[1], k.shape[1]) - 1
    # Diagonal d holds the distances tile * (d - 1) + 1 .. tile * (d + 1) - 1.
    diagonals = range(lowest // tile, (highest - 1) // tile + 2)
    sums = tiles_of_gradients(d_y, delta, bias, q, k, v, lse, marks, pairs, scale, diagonals, tile)
    return sums_by_distance(sums, diagonals.start, lowest, bias.shape[1])


@window_bias_gradient.register_fake
def _(d_y: Tensor, delta: Tensor, bias: Tensor, *_: object) -> Tensor:
    return bias.new_empty(bias.shape)


def sums_by_distance(sums: Tensor, first: int, lowest: int, distances: int) -> Tensor:
    """Sums over each distance, query minus key.

    Args:
        sums: (H, D, S queries, S keys), tiles of consecutive diagonals.
        first: the first of them, whose first query is `first` * S tokens behind its first key.
        lowest: the first distance asked for, one of those in the first diagonal.
        distances: R; what lies behind the last diagonal is 0.

    Returns:
        (H, R).
    """
    size = sums.shape[-1]
    # A diagonal's distances begin with S * (d - 1); its upper half is the lower half of the next.
    rows = sums_of_diagonals(sums, 2 * size).flip(-1).unflatten(-1, (2, size))
    rows = F.pad(rows[:, :, 0], (0, 0, 0, 1)) + F.pad(rows[:, :, 1], (0, 0, 1, 0))
    found = rows.flatten(1)[:, lowest - size * (first - 1) :][:, :distances]
    return F.pad(found, (0, distances - found.shape[1]))


def window_bias_gradient_naive(
    d_y: Tensor,
    delta: Tensor,
    bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    marks: Tensor | None,
    reach: str,
    block_size: int,
    cached: int,
    offset: int,
    scale: float,
) -> Tensor:
    """All scores at once: the definition. Signature of `window_bias_gradient`."""
    query = torch.arange(q.shape[1], device=q.device).unsqueeze(1)
    key = torch.arange(k.shape[1], device=q.device) - cached
    back = query - key
    if reach == "symmetric":
        seen = back.abs() < block_size
    elif reach == "window":
        seen = (back >= 0) & (back < block_size)
    else:
        blocks = [(x + offset).div(block_size, rounding_mode="floor") for x in (query, key)]
        seen = (back >= 0) & (blocks[0] - blocks[1] <= (reach == "own_and_previous"))
    if marks is not None:
        of_key = marks[:, None, : k.shape[1]]
        of_query = marks[:, cached : k.shape[1], None]
        seen = seen & ((back == 0) | (of_key == (0 if reach == "symmetric" else of_query)))
    place = back - Pairs(reach, block_size).first_distance
    place = place.clamp(0, bias.shape[1] - 1)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * scale + bias[:, place]
    weights = (scores - lse.unsqueeze(-1)).exp()
    d_weights = torch.einsum("bthk,bshk->bhts", d_y, v)
    d = weights * (d_weights - delta.transpose(1, 2).unsqueeze(-1))
    d = d.masked_fill(~seen.view(-1, 1, *seen.shape[-2:]), 0).sum(0).flatten(1)
    return torch.zeros_like(bias).index_add(1, place.flatten(), d)
