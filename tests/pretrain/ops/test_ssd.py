"""The chunked form of SSD equals its recurrence: values, states and gradients."""

import pytest
import torch
from torch import Tensor

from pretrain.ops.ssd import ssd, ssd_naive

BATCH, HEADS, WIDTH, GROUPS, STATE, CHUNK = 2, 4, 3, 2, 5, 8

# fp64 and fp32: order of summation. bf16: operands have 8 bits; sums and carries are fp32.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(length: int, dtype: torch.dtype, carried: bool) -> list[Tensor]:
    """u, log_decay, b, c and the state; decays and state in at least fp32."""
    generator = torch.Generator().manual_seed(length)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    steps = draw(BATCH, length, HEADS, dtype=torch.float64)
    leaves = [
        draw(BATCH, length, HEADS, WIDTH, dtype=dtype),
        (-(2 * steps - 2).exp()).detach().to(wide).requires_grad_(),  # 1e-4 to 10 per token
        draw(BATCH, length, GROUPS, STATE, dtype=dtype),
        draw(BATCH, length, GROUPS, STATE, dtype=dtype),
    ]
    return [*leaves, draw(BATCH, HEADS, WIDTH, STATE, dtype=wide)] if carried else leaves


def evaluate(form, leaves: list[Tensor], resets: Tensor | None, edges: range) -> list[Tensor]:
    """y, final state, and the gradients of a fixed functional of both."""
    y, after = form(*leaves, resets=resets, edges=edges, chunk_size=CHUNK)
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (t.to(after.dtype) * torch.randn(t.shape, generator=generator, dtype=after.dtype)).sum()
        for t in (y, after)
    )
    return [y, after, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("first_edge", [None, 0, 5, 16], ids=lambda e: f"edge {e}")
@pytest.mark.parametrize("length", [1, 7, 8, 61])
def test_chunked_form_equals_the_recurrence(
    length: int, first_edge: int | None, carried: bool, dtype: torch.dtype
) -> None:
    leaves = problem(length, dtype, carried)
    resets, edges = None, range(0)
    if first_edge is not None:
        edges = range(first_edge, max(length, first_edge), 2 * CHUNK)
        resets = torch.rand(BATCH, len(edges), generator=torch.Generator().manual_seed(1)) < 0.5
        if not edges:
            resets = None
    got = evaluate(ssd, leaves, resets, edges)
    # bf16 is judged by the recurrence in fp32 on the same, already rounded, inputs.
    wide = [leaf.detach().to(leaves[1].dtype).requires_grad_() for leaf in leaves]
    want = evaluate(ssd_naive, wide, resets, edges)
    assert got[0].dtype == dtype
    assert got[1].dtype == leaves[1].dtype
    if dtype == torch.bfloat16:
        # Gradients are judged together: a single one may be a sum of few terms that cancel.
        got, want = ([*x[:2], torch.cat([g.flatten().float() for g in x[2:]])] for x in (got, want))
    for a, b in zip(got, want, strict=True):
        error = (a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30)
        assert error < BOUNDS[dtype]


def test_decays_over_a_chunk_keep_their_digits() -> None:
    """After strong decays the weights of recent tokens must not come from large differences."""
    length = 64
    leaves = [x.detach() for x in problem(length, torch.float64, False)]
    leaves[1] = leaves[1].clone()
    leaves[1][:, : length // 2] = -1000.0
    want, _ = ssd_naive(*leaves, chunk_size=length)
    got, _ = ssd(*(x.float() for x in leaves), chunk_size=length)
    # fp32 rounds a sum of 32,000 to 2e-3; each log decay alone to 6e-8 of itself.
    error = (got.double() - want)[:, length // 2 :].abs().max() / want.abs().max()
    assert error < 2e-6


def test_chunks_that_straddle_reset_edges_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide the reset grid of 12"):
        ssd(
            *problem(24, torch.float64, False),
            resets=torch.zeros(BATCH, 2, dtype=torch.bool),
            edges=range(0, 24, 12),
            chunk_size=CHUNK,
        )
