"""Attention to the two tokens around each of a few continuous places.

    y_i = softmax over m, j of (q_i . k_j / sqrt(K) - (j - m)^2 / (2 w^2)) times v_j
          for each place m of token i, and j in {floor m, floor m + 1}

Shapes: B batch, T time, H heads, K head width, J places per token and head.

O(T J) and no (T, T) matrix. Which tokens are read is an integer and has no gradient; the places get
theirs through the distances in the scores.
"""

import torch
from torch import Tensor

from pretrain.ops.numerics import no_autocast, wide_dtype


def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    log_width: Tensor,
    first: Tensor,
    count: Tensor,
) -> Tensor:
    """By gathering keys and values.

    Args:
        q: (B, T, H, K).
        k: (B, T, H, K).
        v: (B, T, H, K).
        places: (B, T, H, J) in [0, count - 1], from the start of the sequence, at least fp32.
        log_width: (H, J), log of w in tokens.
        first: (B or 1, 1) int64, where the sequence starts in its lane.
        count: (B or 1, 1) int64, tokens of the sequence.

    Returns:
        (B, T, H, K).
    """
    with no_autocast(q):
        cells, distance = _cells(places, count, log_width)
        length, width = q.shape[1], q.shape[3]
        index = (cells + first[..., None, None, None]).flatten(3).transpose(1, 2)  # (B, H, T, 2 J)
        index = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, width)
        keys, values = (
            x.transpose(1, 2).gather(2, index).unflatten(2, (length, -1)) for x in (k, v)
        )
        scores = (q * width**-0.5).transpose(1, 2).unsqueeze(3) @ keys.transpose(-1, -2)
        scores = scores.squeeze(3).to(wide_dtype(scores)) + distance.flatten(3).transpose(1, 2)
        weights = scores.softmax(-1).to(v.dtype)
        return (weights.unsqueeze(3) @ values).squeeze(3).transpose(1, 2)


def _cells(places: Tensor, count: Tensor, log_width: Tensor) -> tuple[Tensor, Tensor]:
    """The two integers around each place, and their log weights: (B, T, H, J, 2) each."""
    last = (count - 1)[..., None, None]
    lower = places.detach().floor().long()
    cells = torch.stack([lower.minimum(last), (lower + 1).minimum(last)], -1)
    distance = (cells - places.unsqueeze(-1)) / log_width.to(places.dtype).exp().unsqueeze(-1)
    return cells, -0.5 * distance.square()


def indexed_attention_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Tensor,
    log_width: Tensor,
    first: Tensor,
    count: Tensor,
) -> Tensor:
    """A dense (T, T) matrix of unnormalised weights: the definition. Signature of
    `indexed_attention`."""
    cells, distance = _cells(places, count, log_width)
    scores = torch.einsum("bthk,bshk->bths", q, k) * q.shape[-1] ** -0.5
    token = torch.arange(q.shape[1], device=q.device)
    is_read = (cells + first[..., None, None, None]).flatten(3).unsqueeze(-1) == token
    kernel = (distance.flatten(3).exp().unsqueeze(-1) * is_read).sum(3)  # (B, T, H, T)
    weights = kernel * scores.exp()
    return torch.einsum("bths,bshk->bthk", weights / weights.sum(-1, keepdim=True), v)
