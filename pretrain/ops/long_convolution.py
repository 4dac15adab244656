"""Causal convolution with a kernel as long as the sequence.

    y_t = sum_{j <= t} h_{t-j} u_j

Shapes: B batch, T time, D channels, F kernels per channel, W block size, E whole blocks.

The FFT form is causal up to rounding only: a future token reaches the past at 1e-16 of its size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.numerics import no_autocast, wide_dtype


def long_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """u (B, T, D) and kernel (D, T) -> like u; by FFT in at least fp32."""
    length = u.shape[1]
    size = 2 * length  # anything shorter is a circular convolution: the future would leak in
    with no_autocast(u):
        dtype = wide_dtype(u)
        spectrum = torch.fft.rfft(u.to(dtype).permute(2, 0, 1), n=size)
        spectrum = spectrum * torch.fft.rfft(kernel.to(dtype), n=size).unsqueeze(1)
        y = torch.fft.irfft(spectrum, n=size)[..., :length]
    return y.permute(1, 2, 0).to(u.dtype)


def long_convolution_naive(u: Tensor, kernel: Tensor) -> Tensor:
    """One (T, T) Toeplitz matrix per channel. Signature of `long_convolution`."""
    time = torch.arange(u.shape[1], device=u.device)
    lag = time[:, None] - time
    with no_autocast(u):
        matrix = kernel.to(wide_dtype(u))[:, lag.clamp(min=0)] * (lag >= 0)
        return torch.einsum("dts,bsd->btd", matrix, u.to(matrix.dtype)).to(u.dtype)


def convolution_at_block_ends(
    u: Tensor, taps: Callable[[int, int], Tensor], block_size: int
) -> Tensor:
    """The outputs of F kernels per channel at the last token of each whole block.

    Args:
        u: (B, T, D).
        taps: taps(a, b) are the kernels' values at lags a .. b - 1, (F, D, b - a); asked for block
            by block, so that kernels of length T never exist.
        block_size: W.

    Returns:
        (B, E, F, D) in the dtype of `u`.
    """
    batch, length, channels = u.shape
    blocks = length // block_size
    with no_autocast(u):
        x = u[:, : blocks * block_size].to(wide_dtype(u)).flip(1)
        # Newest block first, and in it the newest token first, as lags count.
        x = x.permute(2, 0, 1).reshape(channels, batch, blocks, block_size)
        y = x.new_zeros(batch, blocks, taps(0, 0).shape[0], channels)
        for lag in range(blocks):
            h = taps(lag * block_size, (lag + 1) * block_size).to(x.dtype)
            seen = x[:, :, lag:].reshape(channels, -1, block_size)
            part = torch.bmm(seen, h.permute(1, 2, 0))  # (D, B * blocks with such a lag, F)
            part = part.view(channels, batch, blocks - lag, -1).permute(1, 2, 3, 0)
            part = F.pad(part.flip(1), (0, 0, 0, 0, lag, 0))
            y = y + part
    return y.to(u.dtype)


def convolution_at_block_ends_naive(
    u: Tensor, taps: Callable[[int, int], Tensor], block_size: int
) -> Tensor:
    """Everywhere, then picked. Signature of `convolution_at_block_ends`."""
    outputs = [long_convolution_naive(u, kernel) for kernel in taps(0, u.shape[1])]
    return torch.stack([y[:, block_size - 1 :: block_size] for y in outputs], 2)
