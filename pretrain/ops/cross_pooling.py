"""All products of pairs of hidden states, pooled by the middle of the pair, in O(T log T).

    c_i = [ sum_{t + s = 2i} a_t b_s ; sum_{t + s = 2i + 1} a_t b_s ]

Shapes: B batch, T time, E channels.

Sums over t + s = m are a convolution, hence the FFT; even and odd m share a row, so that each of
the T^2 pairs is in exactly one. Nothing in it knows where position 0 is: shifting the input shifts
the output, and zeros around a sequence add nothing.
"""

import torch
from torch import Tensor

from pretrain.ops.numerics import no_autocast, wide_dtype


def cross_pooling(a: Tensor, b: Tensor) -> Tensor:
    """By FFT.

    Args:
        a: (B, T, E).
        b: (B, T, E).

    Returns:
        (B, T, 2 E), in at least fp32.
    """
    length = a.shape[1]
    with no_autocast(a):
        wide = wide_dtype(a)
        size = 2 * length  # anything shorter is circular: the two ends would be multiplied
        spectrum = torch.fft.rfft(a.to(wide), n=size, dim=1) * torch.fft.rfft(
            b.to(wide), n=size, dim=1
        )
        sums = torch.fft.irfft(spectrum, n=size, dim=1)
        return sums.unflatten(1, (length, 2)).flatten(2)


def cross_pooling_naive(a: Tensor, b: Tensor) -> Tensor:
    """Pair by pair: the definition. Signature of `cross_pooling`."""
    a, b = a.to(wide_dtype(a)), b.to(wide_dtype(b))
    batch, length, channels = a.shape
    rows = [a.new_zeros(batch, channels) for _ in range(2 * length)]
    for t in range(length):
        for s in range(length):
            rows[t + s] = rows[t + s] + a[:, t] * b[:, s]
    return torch.stack(rows, 1).unflatten(1, (length, 2)).flatten(2)
