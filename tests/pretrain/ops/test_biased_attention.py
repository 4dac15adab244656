"""Full and chunked attention with a bias equal one query at a time."""

import pytest
import torch
from torch import Tensor

from pretrain.ops import biased_attention as ops
from pretrain.ops.relative_bias import RotaryBias, T5Bias, toeplitz_bias

W, BATCH, HEADS, KEY, VALUE = 8, 2, 2, 4, 6

# fp64 and fp32: order of summation. bf16: scores and weights have 8 bits, errors average out.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(length: int, cached: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the bias of every distance."""
    generator = torch.Generator().manual_seed(0)
    total = cached + length
    shapes = [(BATCH, length, HEADS, KEY), (BATCH, total, HEADS, KEY), (BATCH, total, HEADS, VALUE)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    bias = torch.randn(HEADS, max(total, W), generator=generator, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return [*(t.to(dtype).requires_grad_() for t in tensors), bias.to(wide).requires_grad_()]


def assert_same(form, tensors: list[Tensor], starts: Tensor, weighting: ops.Weighting) -> None:
    dtype = tensors[0].dtype
    y = form(*tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want = ops.biased_attention_naive(*wide, starts, weighting)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).double()
    got = [y, *torch.autograd.grad((y.double() * weights).sum(), tensors)]
    wanted = [want, *torch.autograd.grad((want * weights).sum(), wide)]
    if dtype == torch.bfloat16:
        # Gradients are judged together: a single one may be a sum of few terms that cancel.
        got, wanted = (
            [x[0], torch.cat([g.flatten().double() for g in x[1:]])] for x in (got, wanted)
        )
    for a, b in zip(got, wanted, strict=True):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-30)
        # A lone key has weight 1 and its scores no gradient at all.
        assert error < BOUNDS[dtype] or (a.double() - b).abs().max() < 1e-2 * BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("weighting", ["softmax", "laplace"])
@pytest.mark.parametrize("length", [1, W - 3, 2 * W + 3])
@pytest.mark.parametrize("offset", [0, 3])
def test_chunks_equal_single_queries(
    offset: int, length: int, weighting: ops.Weighting, dtype: torch.dtype
) -> None:
    starts = (torch.arange(offset, offset + length) // W * W).expand(BATCH, -1)
    assert_same(
        lambda *t: ops.chunk_attention(*t, chunk_size=W, offset=offset, weighting=weighting),
        problem(length, offset, dtype),
        starts,
        weighting,
    )


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("weighting", ["softmax", "laplace"])
@pytest.mark.parametrize("cached", [0, 5])
def test_full_attention_equals_single_queries(
    cached: int, weighting: ops.Weighting, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "QUERY_BLOCK", 4)
    starts = torch.tensor([[2] * 3 + [7] * 7, [0] * 10]).clamp(max=cached + torch.arange(10))
    assert_same(
        lambda *t: ops.full_attention(*t, starts, weighting),
        problem(10, cached, dtype),
        starts,
        weighting,
    )


def test_laplace_meets_squared_relu_and_stays_bounded() -> None:
    """At sqrt(1/2) it has the value and the slope of relu(x)^2."""
    x = torch.tensor([-9.0, 0.5**0.5, 9.0], dtype=torch.float64, requires_grad=True)
    y = ops.laplace(x)
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope[1], torch.tensor(2**0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("queries", "keys", "newest"), [(1, 1, 0), (3, 8, 7), (3, 4, 9), (8, 8, 7)]
)
def test_a_bias_row_becomes_the_toeplitz_matrix_of_distances(
    queries: int, keys: int, newest: int
) -> None:
    bias = torch.arange(20.0).repeat(2, 1)
    distance = newest - torch.arange(queries).flip(0)[:, None] - torch.arange(keys)
    got = toeplitz_bias(bias, queries, keys, newest)
    assert torch.equal(got, distance.clamp(min=0).float().expand(2, -1, -1))


def test_biases_depend_on_the_table_they_learn() -> None:
    torch.manual_seed(0)
    for bias in (T5Bias(2), RotaryBias(2, 4)):
        for parameter in bias.parameters():
            torch.nn.init.normal_(parameter)
        values = bias(torch.arange(64))
        assert values.shape == (2, 64)
        assert values.std(1).min() > 0
