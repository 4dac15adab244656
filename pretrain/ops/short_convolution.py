"""A short causal convolution per channel that continues a stream.

    y_t = bias + sum_k weight_k x_{t - (K - 1) + k}

Shapes: B batch, T time, D channels, K taps.

K shifted products in place of a convolution kernel: K is 4, and a sum of that many terms in a fixed
order is causal to the last bit. Tokens before the start of a document are zeros.
"""

import torch
from torch import Tensor


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
) -> tuple[Tensor, Tensor]:
    """Convolves x (B, T, D).

    Args:
        x: the inputs.
        weight: (D, K), the last tap is the present token's.
        bias: (D,).
        state: (B, K - 1, D), the inputs before this call, zeros before the document; None: zeros.
        resets: (B, n) bool, True where a document begins at that edge.
        edges: the n token offsets of `resets`.

    Returns:
        y like `x`, and the state after the last token.
    """
    batch, length, channels = x.shape
    taps = weight.shape[1]
    if state is None:
        state = x.new_zeros(batch, taps - 1, channels)
    stream = torch.cat([state.to(x.dtype), x], 1)
    starts = _document_starts(resets, edges, length)
    token = torch.arange(length, device=x.device)
    weight, y = weight.to(x.dtype), bias.to(x.dtype)
    for lag in range(taps):
        first = taps - 1 - lag
        seen = stream[:, first : first + length]
        if starts is not None and lag > 0:
            seen = seen * (token - lag >= starts).unsqueeze(-1)
        y = y + seen * weight[:, first]
    after = stream[:, length:]
    if starts is not None:
        kept = torch.arange(length - taps + 1, length, device=x.device) >= starts[:, -1:]
        return y, after * kept.unsqueeze(-1)
    return y, after.clone()  # a view would keep all of the stream alive


def _document_starts(resets: Tensor | None, edges: range, length: int) -> Tensor | None:
    """(B, T) offset at which each token's document begins, far in the past for the first one."""
    if resets is None:
        return None
    long_ago = -(2**40)
    offsets = torch.arange(edges.start, edges.stop, edges.step, device=resets.device)
    starts = torch.full((resets.shape[0], length), long_ago, device=resets.device)
    starts[:, edges.start :: edges.step] = torch.where(resets, offsets, long_ago)
    return starts.cummax(1).values
