"""Pooling by FFT equals the sum over all pairs."""

import pytest
import torch

from pretrain.ops.cross_pooling import cross_pooling, cross_pooling_naive

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}  # rounding of the transforms


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 9, 16])
def test_fft_equals_pair_by_pair(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)
    a, b = (
        torch.randn(2, length, 3, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    a.requires_grad_()
    got, want = cross_pooling(a, b), cross_pooling_naive(a, b)
    weights = torch.randn(want.shape, generator=generator, dtype=torch.float64).to(dtype)
    for x, y in (
        (got, want),
        *zip(
            torch.autograd.grad((got * weights).sum(), a),
            torch.autograd.grad((want * weights).sum(), a),
            strict=True,
        ),
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=BOUNDS[dtype] * y.abs().max().item())


def test_all_pairs_are_pooled_exactly_once() -> None:
    ones = torch.ones(1, 7, 1, dtype=torch.float64)
    pairs = cross_pooling(ones, ones)[0]
    assert pairs.sum().item() == pytest.approx(49)
    # Around token 2: (2, 2), (1, 3), (0, 4) and their mirror images; then those with t + s = 5.
    assert pairs[2].tolist() == pytest.approx([5, 6])
