"""Attention to a symmetric window, for encoders: the keys less than W tokens away on either side.

Shapes: B batch, T time, H heads, K head width, W window size.

Time is cut at multiples of W and the queries of a block see the previous, the own and the next one:
masks are (W, 3W), and cost and memory linear in T. A token always sees itself, also where it is a
pad: a row without any key would be NaN, and NaN times a weight of zero is NaN. Compiled blocks on a
GPU have a kernel that copies no keys, pretrain/ops/flex_symmetric_window.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.flex_symmetric_window import flex_symmetric_window_attention
from pretrain.ops.flex_window_attention import TILE
from pretrain.ops.masked_attention import masked_attention
from pretrain.ops.relative_bias import toeplitz_bias


def symmetric_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    padding: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of whole sequences, one per lane.

    Args:
        q: (B, T, H, K).
        k: (B, T, H, K).
        v: like `k`.
        window_size: W; keys at distances -(W - 1) .. W - 1 are visible.
        padding: (B, T) bool, True where a lane has no token: nothing else sees those keys.
        scale: of the scores; None: 1 / sqrt(K).
        bias: (H, 2W - 1) what is added to the scaled score of a key at distances -(W - 1) .. W - 1
            (query minus key); at least fp32.

    Returns:
        (B, T, H, K); rows of pads mean nothing.
    """
    length, w = q.shape[1], window_size
    # Outside of a compiled block it would have to be compiled by itself, for every length anew.
    if torch.compiler.is_compiling() and q.device.type == "cuda" and length >= TILE:
        return flex_symmetric_window_attention(
            q, k, v, window_size=w, padding=padding, scale=scale, bias=bias
        )
    count = -(-length // w)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, count * w - length)) for x in (q, k, v))
    keys, values = (_neighbours(x, w).flatten(0, 1).transpose(1, 2) for x in (k, v))
    queries = q.unflatten(1, (count, w)).flatten(0, 1).transpose(1, 2)
    mask = _visible(q, length, w, padding)
    if bias is not None:
        wide = toeplitz_bias(F.pad(bias, (0, w)), w, 3 * w, 3 * w - 2).to(q.dtype)
        mask = wide.masked_fill(~mask, -torch.inf)
    y = masked_attention(queries, keys, values, mask, scale)
    return y.transpose(1, 2).unflatten(0, (-1, count)).flatten(1, 2)[:, :length]


def _neighbours(x: Tensor, w: int) -> Tensor:
    """(B, count * W, ...) -> (B, count, 3W, ...): the blocks before, at and after each block."""
    blocks = F.pad(x, (0, 0) * (x.ndim - 2) + (w, w)).unflatten(1, (-1, w))
    return torch.cat([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], 2)


def _visible(q: Tensor, length: int, w: int, padding: Tensor | None) -> Tensor:
    """(B * count, 1, W, 3W) bool, True where visible."""
    query = w + torch.arange(w, device=q.device).unsqueeze(1)
    distance = query - torch.arange(3 * w, device=q.device)
    token = q.new_zeros(q.shape[0], q.shape[1], dtype=torch.bool)
    token[:, :length] = True if padding is None else ~padding
    keys = _neighbours(token, w).flatten(0, 1).unsqueeze(1)
    return (((distance.abs() < w) & keys) | (distance == 0)).unsqueeze(1)


def symmetric_window_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_size: int,
    padding: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One dense masked softmax: the definition. Signature of `symmetric_window_attention`."""
    place = torch.arange(q.shape[1], device=q.device)
    distance = place.unsqueeze(1) - place
    visible = (distance.abs() < window_size).expand(q.shape[0], -1, -1)
    if padding is not None:
        visible = visible & ~padding.unsqueeze(1) | (distance == 0)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if bias is not None:
        reach = window_size - 1
        scores = scores + bias[:, distance.clamp(-reach, reach) + reach]
    weights = scores.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, v)
