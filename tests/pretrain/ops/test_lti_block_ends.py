"""Read-outs at block ends equal the recurrence, picked."""

import pytest
import torch
from torch import Tensor

from pretrain.ops.lti_block_ends import lti_block_ends, lti_block_ends_naive
from pretrain.ops.lti_ssm import SSMParameters

CHANNELS, MODES, BATCH, CHUNK, W, READS = 3, 4, 2, 4, 8, 5

# fp64 and fp32: order of summation. bf16: operands have 8 bits; sums and carries are fp32.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(length: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(length)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [
        draw(CHANNELS) - 3,
        draw(CHANNELS, MODES) * 0.3 - 0.7,
        3 * torch.arange(MODES, dtype=torch.float64) + 0.1 * draw(CHANNELS, MODES),
        draw(READS, CHANNELS, MODES, 2),
        draw(READS, CHANNELS),
        draw(BATCH, CHANNELS, 2, MODES),
    ]
    leaves = [leaf.to(wide).requires_grad_() for leaf in leaves]
    return draw(BATCH, length, CHANNELS).to(dtype).requires_grad_(), leaves


def evaluate(form, u: Tensor, leaves: list[Tensor], **arguments) -> list[Tensor]:
    """y, final state, and the gradients of a fixed functional of both."""
    y, after = form(
        u, SSMParameters(*leaves[:5]), leaves[5], block_size=W, chunk_size=CHUNK, **arguments
    )
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (t.to(after.dtype) * torch.randn(t.shape, generator=generator, dtype=after.dtype)).sum()
        for t in (y, after)
    )
    gradients = torch.autograd.grad(loss, [u, *leaves], allow_unused=True, materialize_grads=True)
    return [y, after, torch.cat([g.flatten().to(after.dtype) for g in gradients])]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("flags", [False, True], ids=["", "resets"])
@pytest.mark.parametrize("offset", [0, 3, 4, 7])
@pytest.mark.parametrize("length", [1, W - 1, W, 3 * W + 3])
def test_block_ends_are_those_of_the_recurrence(
    length: int, offset: int, flags: bool, dtype: torch.dtype
) -> None:
    u, leaves = problem(length, dtype)
    edges = range(-offset % W, max(length, -offset % W), W)
    resets = None
    if flags and edges:
        generator = torch.Generator().manual_seed(1)
        resets = torch.rand(BATCH, len(edges), generator=generator) < 0.5
    arguments = {"offset": offset, "resets": resets, "edges": edges}
    got = evaluate(lti_block_ends, u, leaves, **arguments)
    wide = u.detach().to(leaves[0].dtype).requires_grad_()
    want = evaluate(lti_block_ends_naive, wide, leaves, **arguments)
    assert got[0].shape == (BATCH, (offset + length) // W, READS, CHANNELS)
    assert got[0].dtype == dtype
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        error = (a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30)
        assert error < BOUNDS[dtype]


def test_traced_it_computes_the_same() -> None:
    torch._dynamo.reset()
    traced = torch.compile(lti_block_ends, fullgraph=True, dynamic=False, backend="aot_eager")
    u, leaves = problem(3 * W + 3, torch.float64)
    edges = range(5, 3 * W + 3, W)
    resets = torch.tensor([[False, True, False], [True, False, False]])
    arguments = {"offset": 3, "resets": resets, "edges": edges}
    results = [evaluate(form, u, leaves, **arguments) for form in (traced, lti_block_ends)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=BOUNDS[torch.float64])
