"""Blocked symmetric windows equal the dense masked softmax, on both sides and beside pads."""

import pytest
import torch

from pretrain.ops.symmetric_window_attention import (
    symmetric_window_attention,
    symmetric_window_attention_naive,
)

W, BATCH, HEADS, WIDTH = 8, 2, 2, 4

# fp64 and fp32: order of summation. bf16: scores and weights have 8 bits, errors average out.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("length", [1, W - 1, W, W + 1, 3 * W + 3])
def test_blocked_form_equals_dense_masked_softmax(
    length: int, biased: bool, padded: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(BATCH, length, HEADS, WIDTH, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for _ in range(3)
    ]
    padding = torch.rand(BATCH, length, generator=generator) < 0.4 if padded else None
    bias = torch.randn(HEADS, 2 * W - 1, generator=generator) if biased else None
    y = symmetric_window_attention(*tensors, window_size=W, padding=padding, bias=bias)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want = symmetric_window_attention_naive(
        *wide, window_size=W, padding=padding, bias=None if bias is None else bias.double()
    )
    weights = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    got = [y, *torch.autograd.grad((y.double() * weights).sum(), tensors)]
    wanted = [want, *torch.autograd.grad((want * weights).sum(), wide)]
    for a, b in zip(got, wanted, strict=True):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-30)
        # A lone key has weight 1 and its scores no gradient at all, but for rounding.
        assert error < BOUNDS[dtype] or (a.double() - b).abs().max() < 1e-1 * BOUNDS[dtype]


def test_naive_mask_is_what_the_words_say() -> None:
    """One-hot values read the visible set of every query off the output."""
    length = 3 * W
    q = torch.zeros(1, length, 1, length)
    eye = torch.eye(length)[None, :, None]
    seen = symmetric_window_attention_naive(q, eye, eye, window_size=W)[0, :, 0] > 0
    for i in range(length):
        want = [j for j in range(length) if abs(i - j) < W]
        assert seen[i].nonzero().flatten().tolist() == want
