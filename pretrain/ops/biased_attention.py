"""Causal attention with a position bias, by softmax or by MEGA's Laplace function.

    softmax  a_ij = softmax_j(q_i . k_j / sqrt(K) + b_{i-j})
    laplace  a_ij = (1 + erf((s_ij - sqrt(1/2)) / (sqrt(1/(4 pi)) sqrt(2)))) / 2,
             s_ij = q_i . k_j / n_i + b_{i-j}     n_i: keys that query i sees (2209.10655)

Shapes: B batch, T queries, M cached keys in front of them, H heads, K key width, V value width,
R distances, W chunk size.

Laplace weights do not sum to one and do not compete: that is why its scores are divided by a
length. In a causal model the length is the number of *visible* keys, different for every query.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from pretrain.ops.attention_weights import attention_weights
from pretrain.ops.numerics import wide_dtype
from pretrain.ops.relative_bias import toeplitz_bias
from pretrain.ops.window_attention import query_runs

Weighting = Literal["softmax", "laplace"]

# Rows of the score matrix that are alive at once in full attention.
QUERY_BLOCK = 512


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, starts: Tensor | None, weighting: Weighting
) -> Tensor:
    """Attention to everything since the start of the document.

    Args:
        q: (B, T, H, K).
        k: (B, M + T, H, K).
        v: (B, M + T, H, V).
        bias: (H, R), R >= M + T.
        starts: (B, T) or (B, 1), index of the first key that each query sees; None: the first.
        weighting: "softmax" or "laplace".

    Returns:
        (B, T, H, V).
    """
    cached, outputs = k.shape[1] - q.shape[1], []
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    key = torch.arange(k.shape[2], device=k.device)
    for first in range(0, q.shape[2], QUERY_BLOCK):
        rows = q[:, :, first : first + QUERY_BLOCK]
        end = cached + first + rows.shape[2]
        query = key[cached + first : end, None]
        visible = key[:end] <= query
        if starts is not None:
            visible = visible & (key[:end] >= starts[:, first : first + QUERY_BLOCK, None])
        matrix = toeplitz_bias(bias, rows.shape[2], end, end - 1)
        visible = visible.view(-1, 1, *visible.shape[-2:])
        outputs.append(_attend(rows, k[:, :, :end], v[:, :, :end], matrix, visible, weighting))
    return torch.cat(outputs, 2).transpose(1, 2)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    *,
    chunk_size: int,
    offset: int,
    weighting: Weighting,
) -> Tensor:
    """Attention inside chunks that do not overlap (MEGA-chunk); documents begin on chunks.

    Args:
        q: (B, T, H, K).
        k: (B, M + T, H, K), M = `offset`.
        v: (B, M + T, H, V).
        bias: (H, R), R >= W.
        chunk_size: W.
        offset: tokens of the first chunk that came before this call, < W.
        weighting: "softmax" or "laplace".

    Returns:
        (B, T, H, V).
    """
    outputs = []
    for start, stop, size in query_runs(q.shape[1], offset, chunk_size, alone=False):
        at = offset if start == 0 else 0  # tokens of this run's chunks in front of its queries
        count = (stop - start) // size
        queries = q[:, start:stop].unflatten(1, (count, size)).flatten(0, 1).transpose(1, 2)
        first = start + offset - at
        keys, values = (
            x[:, first : stop + offset].unflatten(1, (count, at + size)).flatten(0, 1)
            for x in (k, v)
        )
        matrix = toeplitz_bias(bias, size, at + size, at + size - 1)
        visible = torch.ones(size, at + size, dtype=torch.bool, device=q.device).tril(at)
        y = _attend(
            queries, keys.transpose(1, 2), values.transpose(1, 2), matrix, visible, weighting
        )
        outputs.append(y.transpose(1, 2).unflatten(0, (-1, count)).flatten(1, 2))
    return torch.cat(outputs, 1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor, weighting: Weighting
) -> Tensor:
    """q (B, H, I, K), k (B, H, J, K), v (B, H, J, V), bias (H, I, J), visible (..., I, J)."""
    scores = q @ k.transpose(2, 3)
    scores = scores.to(wide_dtype(scores))
    if weighting == "softmax":
        scores = scores * q.shape[-1] ** -0.5 + bias
        (weights,) = attention_weights((scores.masked_fill(~visible, -torch.inf),), v.dtype)
    else:
        scores = scores / visible.sum(-1, keepdim=True) + bias
        weights = laplace(scores).masked_fill(~visible, 0.0).to(v.dtype)
    return weights @ v


def laplace(scores: Tensor) -> Tensor:
    """MEGA's attention function: close to squared ReLU, with bounded slope and values."""
    mean, deviation = math.sqrt(0.5), math.sqrt(1 / (4 * math.pi))
    return 0.5 * (1 + torch.erf((scores - mean) / (deviation * math.sqrt(2))))


def biased_attention_naive(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, starts: Tensor, weighting: Weighting
) -> Tensor:
    """One query at a time over the keys it sees: the definition. Arguments of `full_attention`."""
    cached, outputs = k.shape[1] - q.shape[1], []
    for lane in range(q.shape[0]):
        for i in range(q.shape[1]):
            first, end = int(starts[lane, min(i, starts.shape[1] - 1)]), cached + i + 1
            scores = torch.einsum("hk,jhk->hj", q[lane, i], k[lane, first:end])
            distances = bias[:, : end - first].flip(1)
            if weighting == "softmax":
                weights = (scores / math.sqrt(q.shape[-1]) + distances).softmax(-1)
            else:
                weights = laplace(scores / (end - first) + distances)
            outputs.append(torch.einsum("hj,jhv->hv", weights, v[lane, first:end]))
    return torch.stack(outputs).view(*q.shape[:3], v.shape[-1])
