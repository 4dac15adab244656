"""Window-and-summaries attention equals one query at a time, with its own list of keys."""

import pytest
import torch
from torch import Tensor

from pretrain.ops.summary_attention import summary_attention, summary_attention_naive

BATCH, HEADS, WIDTH, W = 2, 2, 4, 4

# fp64 and fp32: order of summation. bf16: scores and weights have 8 bits.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(
    length: int, cached: int, blocks: int, summaries: int, dtype: torch.dtype
) -> list[Tensor]:
    """q, k, v, q_long, bank_k, bank_v."""
    generator = torch.Generator().manual_seed(length)
    heads = (HEADS, WIDTH)
    shapes = [
        (BATCH, length, *heads),
        (BATCH, cached + length, *heads),
        (BATCH, cached + length, *heads),
        (BATCH, length, *heads),
        (BATCH, blocks, summaries, *heads),
        (BATCH, blocks, summaries, *heads),
    ]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("with_fresh", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("offset", [None, 0, 3], ids=["no cache", "block edge", "inside"])
@pytest.mark.parametrize("length", [1, W, 3 * W + 2])
@pytest.mark.parametrize("summaries", [0, 1, 3])
def test_equals_one_query_at_a_time(
    summaries: int, length: int, offset: int | None, with_fresh: bool, dtype: torch.dtype
) -> None:
    cached, offset = (0, 0) if offset is None else (W, offset)
    blocks = -(-(offset + length) // W)
    leaves = problem(length, cached, blocks, summaries, dtype)
    generator = torch.Generator().manual_seed(1)
    known = torch.rand(BATCH, blocks, summaries, generator=generator) < 0.6
    fresh = None
    if with_fresh:
        fresh = torch.rand(BATCH, blocks, generator=generator) < 0.5
    weights = torch.randn(BATCH, length, HEADS, WIDTH, generator=generator)

    def evaluate(form, inputs: list[Tensor]) -> list[Tensor]:
        y = form(*inputs, known, block_size=W, offset=offset, fresh=fresh)
        loss = (y * weights.to(y.dtype)).sum()
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        return [y, torch.cat([g.flatten() for g in gradients])]

    got = evaluate(summary_attention, leaves)
    wide = torch.promote_types(dtype, torch.float32)
    want = evaluate(summary_attention_naive, [x.detach().to(wide).requires_grad_() for x in leaves])
    for a, b in zip(got, want, strict=True):
        assert (a.to(wide) - b).norm() / b.norm() < BOUNDS[dtype]
    assert got[0].dtype == dtype
