"""Blocked attention equals the dense masked softmax."""

import pytest
import torch
from torch import Tensor

from pretrain.ops.window_attention import (
    Reach,
    cached_keys,
    window_attention,
    window_attention_naive,
    window_attention_sdpa,
)

W, BATCH, HEADS, WIDTH = 8, 2, 2, 4
REACHES: list[Reach] = ["window", "own", "own_and_previous"]

# fp64 and fp32: order of summation. bf16: scores and weights have 8 bits, errors average out.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def qkv(length: int, cached: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(BATCH, n, HEADS, WIDTH, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for n in (length, cached + length, cached + length)
    ]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("form", [window_attention, window_attention_sdpa], ids=["cpu", "sdpa"])
@pytest.mark.parametrize(
    ("length", "biased"),
    [*((n, False) for n in (1, W - 1, W, W + 1, 3 * W + 3)), (W - 1, True), (3 * W + 3, True)],
)
@pytest.mark.parametrize("offset", [None, 0, 3], ids=lambda o: f"offset {o}")
def test_blocked_forms_equal_dense_masked_softmax(
    form, reach: Reach, length: int, offset: int | None, biased: bool, dtype: torch.dtype
) -> None:
    cached = 0 if offset is None else cached_keys(reach, W, offset)
    tensors = qkv(length, cached, dtype)
    if biased:
        generator = torch.Generator().manual_seed(3)
        bias = torch.randn(HEADS, W if reach != "own_and_previous" else 2 * W, generator=generator)
        tensors.append(bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_())
    arguments = {"block_size": W, "reach": reach, "offset": offset or 0}
    blocks = -(-((offset or 0) + length) // W)
    flags = torch.rand(BATCH, blocks, generator=torch.Generator().manual_seed(1)) < 0.5
    cases = [flags, flags[:, :1]] if offset is not None else [flags, None]
    for fresh in cases:
        q, k, v, *rest = tensors
        y = form(q, k, v, fresh=fresh, bias=rest[0] if rest else None, **arguments)
        wide = [t.detach().to(torch.float64).requires_grad_() for t in tensors]
        q, k, v, *rest = wide
        bias = rest[0] if rest else None
        want = window_attention_naive(q, k, v, fresh=fresh, bias=bias, **arguments)
        weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).double()
        got = [y, *torch.autograd.grad((y.double() * weights).sum(), tensors)]
        wanted = [want, *torch.autograd.grad((want * weights).sum(), wide)]
        for a, b in zip(got, wanted, strict=True):
            error = (a.double() - b).norm() / b.norm().clamp(min=1e-30)
            # A lone key has weight 1 and its scores no gradient at all.
            assert error < BOUNDS[dtype] or (a.double() - b).abs().max() < 1e-2 * BOUNDS[dtype]


@pytest.mark.parametrize("reach", REACHES)
def test_naive_masks_are_what_the_words_say(reach: Reach) -> None:
    """One-hot values read the visible set of every query off the output."""
    length = 3 * W
    q = torch.zeros(1, length, 1, length, dtype=torch.float64)
    eye = torch.eye(length, dtype=torch.float64)[None, :, None]
    seen = window_attention_naive(q, eye, eye, block_size=W, reach=reach)[0, :, 0] > 0
    for i in range(length):
        first = {
            "window": max(0, i - W + 1),
            "own": i // W * W,
            "own_and_previous": max(0, (i // W - 1) * W),
        }[reach]
        assert seen[i].nonzero().flatten().tolist() == list(range(first, i + 1))


def test_no_mask_is_quadratic_in_time() -> None:
    """The largest tensor of a call grows linearly."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    sizes = []
    for blocks in (8, 16, 32):
        q, k, v = (t.detach() for t in qkv(blocks * W, 0, torch.float32))
        with Largest() as largest:
            window_attention_sdpa(q, k, v, block_size=W, reach="window")
            window_attention(q, k, v, block_size=W, reach="window")
        sizes.append(largest.numel)
    assert sizes[2] < 2.2 * sizes[1] < 4.84 * sizes[0]
