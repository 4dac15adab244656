"""Attention to predicted places against a dense matrix, and its gradient against differences."""

import pytest
import torch
from torch import Tensor

from pretrain.ops.indexed_attention import indexed_attention, indexed_attention_naive

BATCH, LENGTH, HEADS, WIDTH, PLACES = 2, 11, 2, 4, 3

# fp64 and fp32: order of summation. bf16: scores and weights have 8 bits.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, places and log widths; the first tokens and the counts of two padded lanes."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    first, count = torch.tensor([[0], [3]]), torch.tensor([[LENGTH], [5]])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = [draw(BATCH, LENGTH, HEADS, WIDTH).to(dtype) for _ in range(3)]
    places = draw(BATCH, LENGTH, HEADS, PLACES).sigmoid() * (count - 1)[..., None, None]
    leaves = [*heads, places.to(wide), 0.3 * draw(HEADS, PLACES).to(wide)]
    return [leaf.requires_grad_() for leaf in leaves], first, count


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_gathering_equals_a_dense_matrix(dtype: torch.dtype) -> None:
    leaves, first, count = problem(dtype)
    weights = torch.randn(BATCH, LENGTH, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))

    def evaluate(form, inputs: list[Tensor]) -> list[Tensor]:
        y = form(*inputs, first, count)
        gradients = torch.autograd.grad((y * weights.to(y.dtype)).sum(), inputs)
        return [y, torch.cat([g.flatten().to(inputs[3].dtype) for g in gradients])]

    got = evaluate(indexed_attention, leaves)
    wide = leaves[3].dtype
    want = evaluate(indexed_attention_naive, [x.detach().to(wide).requires_grad_() for x in leaves])
    assert got[0].dtype == dtype
    for a, b in zip(got, want, strict=True):
        assert (a.to(wide) - b).norm() / b.norm() < BOUNDS[dtype]


def test_gradients_of_places_are_those_of_the_two_cells_around_them() -> None:
    """Between two integers the attention is differentiable, and autograd finds that derivative."""
    leaves, first, count = problem(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: indexed_attention(*x, first, count), leaves)


def test_only_the_cells_around_a_place_are_read() -> None:
    (q, k, v, _, log_width), first, count = problem(torch.float64)
    places = torch.full((BATCH, LENGTH, HEADS, PLACES), 2.4, dtype=torch.float64)
    y = indexed_attention(q, k, v, places, log_width, first, count)
    for lane in range(BATCH):
        for token in range(LENGTH):
            changed = v.detach().clone()
            changed[lane, token] += 1
            other = indexed_attention(q, k, changed, places, log_width, first, count)
            read = int(first[lane]) + 2 <= token <= int(first[lane]) + 3
            assert ((other - y).abs().max() > 0) == read
