"""Long convolutions equal the Toeplitz matrix, everywhere or at block ends."""

import pytest
import torch

from pretrain.ops.long_convolution import (
    convolution_at_block_ends,
    convolution_at_block_ends_naive,
    long_convolution,
    long_convolution_naive,
)

BATCH, CHANNELS, KERNELS, W = 2, 3, 5, 4
# fp64, fp32: order of summation. bf16: the inputs are rounded before, the output after, the sum.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("length", [1, 4, 7, 33])
@pytest.mark.parametrize("ends", [False, True], ids=["everywhere", "at block ends"])
def test_fast_forms_equal_the_toeplitz_matrix(ends: bool, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    u = torch.randn(BATCH, length, CHANNELS).to(dtype).requires_grad_()
    kernels = torch.randn(KERNELS, CHANNELS, length, dtype=wide, requires_grad=True)
    results = []
    for fast in (True, False):
        x = u if fast else u.detach().to(wide).requires_grad_()
        if ends:
            form = convolution_at_block_ends if fast else convolution_at_block_ends_naive
            y = form(x, lambda a, b: kernels[:, :, a:b], W)
            assert y.shape == (BATCH, length // W, KERNELS, CHANNELS)
        else:
            y = (long_convolution if fast else long_convolution_naive)(x, kernels[0])
        torch.manual_seed(1)
        loss = (y.to(wide) * torch.randn(y.shape, dtype=wide)).sum()
        if y.numel():
            results.append([y, *torch.autograd.grad(loss, [x, kernels])])
    for a, b in zip(*results, strict=True) if results else ():
        assert (a.to(wide) - b).norm() <= BOUNDS[dtype] * b.norm()
        assert a.dtype == (b.dtype if a.shape == kernels.shape else dtype)


def test_the_convolution_is_not_circular() -> None:
    torch.manual_seed(0)
    u, kernel = torch.randn(1, 33, 2, dtype=torch.float64), torch.randn(2, 33).double()
    late = u.clone()
    late[:, -1] += 100
    y, other = long_convolution(u, kernel), long_convolution(late, kernel)
    torch.testing.assert_close(y[:, :-1], other[:, :-1], rtol=0, atol=1e-12 * 100)
