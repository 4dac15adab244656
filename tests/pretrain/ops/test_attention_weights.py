"""A softmax over parts is the softmax of the parts joined, and keeps nothing but its weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.ops.attention_weights import attention_weights

ROWS, WIDTHS = (2, 3), (5, 1, 4)

# fp64 and fp32: exp(s - log sum) rounds otherwise than exp(s - max) / sum. bf16: 8 bits.
BOUNDS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def problem(dtype: torch.dtype) -> list[Tensor]:
    """Scores of each part, some hidden; of one row a whole part."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    parts = []
    for width in WIDTHS:
        scores = 4 * torch.randn(*ROWS, width, generator=generator, dtype=torch.float64)
        scores[0, 0, : width // 2] = -torch.inf
        scores[1, 1] = -torch.inf if width == WIDTHS[-1] else scores[1, 1]
        parts.append(scores.to(wide).requires_grad_())
    return parts


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_parts_equal_the_softmax_of_all(dtype: torch.dtype, compiled: bool) -> None:
    def form(*scores: Tensor) -> tuple[Tensor, ...]:
        return attention_weights(scores, dtype)

    if compiled:
        torch._dynamo.reset()
        form = torch.compile(form, backend="aot_eager", fullgraph=True)
    parts = problem(dtype)
    got = form(*parts)
    assert {weights.dtype for weights in got} == {dtype}
    joined = torch.cat([part.detach().double() for part in parts], -1).requires_grad_()
    want = joined.softmax(-1)
    above = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (gradient,) = torch.autograd.grad(want, joined, above.double())
    gradients = torch.autograd.grad(got, parts, above.split(WIDTHS, -1))
    for a, b in ((torch.cat(got, -1), want), (torch.cat(gradients, -1), gradient)):
        assert (a.double() - b).abs().max() < BOUNDS[dtype]
        assert (a[joined.isinf()] == 0).all()


def test_it_keeps_its_weights_alone() -> None:
    kept: list[Tensor] = []

    def keep(x: Any) -> Any:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        weights = attention_weights(problem(torch.bfloat16), torch.bfloat16)
    assert [x.data_ptr() for x in kept] == [w.data_ptr() for w in weights]
