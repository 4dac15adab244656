"""The chunked MIMO op equals its recurrence: values, states and gradients."""

import itertools

import pytest
import torch
from torch import Tensor

from pretrain.ops.mimo_ssm import MIMOParameters, mimo_ssm, mimo_ssm_naive

CHANNELS, MODES, BATCH, CHUNK = 3, 4, 2, 8

# fp64 and fp32: order of summation. bf16: operands have 8 bits; sums and carries are fp32.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(length: int, dtype: torch.dtype, carried: bool) -> tuple[Tensor, list[Tensor]]:
    """u in `dtype`, and the parameters and the state in at least fp32."""
    generator = torch.Generator().manual_seed(length)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [
        draw(MODES) - 3,
        draw(MODES) * 0.3 - 0.7,
        3 * torch.arange(MODES, dtype=torch.float64) + 0.1 * draw(MODES),
        draw(MODES, CHANNELS, 2),
        draw(CHANNELS, MODES, 2),
        draw(CHANNELS),
    ]
    if carried:
        leaves.append(draw(BATCH, 2, MODES))
    leaves = [leaf.to(wide).requires_grad_() for leaf in leaves]
    return draw(BATCH, length, CHANNELS).to(dtype).requires_grad_(), leaves


def evaluate(form, u, leaves, resets, edges) -> list[Tensor]:
    """y, final state, and the gradients of a fixed functional of both."""
    state = leaves[6] if len(leaves) > 6 else None
    parameters = MIMOParameters(*leaves[:6])
    y, after = form(u, parameters, state, resets=resets, edges=edges, chunk_size=CHUNK)
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
        for t in (y, after)
    )
    return [y, after, *torch.autograd.grad(loss, [u, *leaves])]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("first_edge", [None, 0, 5], ids=lambda e: f"edge {e}")
@pytest.mark.parametrize("length", [1, 7, 24, 61])
def test_chunked_form_equals_the_recurrence(
    length: int, first_edge: int | None, carried: bool, dtype: torch.dtype
) -> None:
    u, leaves = problem(length, dtype, carried)
    resets, edges = None, range(0)
    if first_edge is not None and first_edge < length:
        edges = range(first_edge, length, 2 * CHUNK)
        generator = torch.Generator().manual_seed(1)
        resets = torch.rand(BATCH, len(edges), generator=generator) < 0.5
    got = evaluate(mimo_ssm, u, leaves, resets, edges)
    # All are judged by the recurrence in fp64 on the same, already rounded, inputs.
    wide, *wide_leaves = (t.detach().double().requires_grad_() for t in (u, *leaves))
    want = evaluate(mimo_ssm_naive, wide, wide_leaves, resets, edges)
    if dtype == torch.bfloat16:
        # Gradients are judged together: a single one may be a sum of few terms that cancel.
        got, want = ([*x[:2], torch.cat([g.flatten().float() for g in x[2:]])] for x in (got, want))
    for a, b in zip(got, want, strict=True):
        error = (a.double() - b.double()).norm() / b.norm().clamp(min=1e-30)
        assert error < BOUNDS[dtype]
    assert got[0].dtype == dtype
    assert got[1].dtype == leaves[0].dtype


def test_chunk_size_changes_nothing_but_rounding() -> None:
    u, leaves = problem(50, torch.float64, True)
    outputs = [
        mimo_ssm(u, MIMOParameters(*leaves[:6]), leaves[6], chunk_size=size)[0]
        for size in (1, 3, 16, 64)
    ]
    for a, b in itertools.pairwise(outputs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_chunks_that_straddle_reset_edges_are_refused() -> None:
    u, leaves = problem(24, torch.float64, False)
    with pytest.raises(ValueError, match="does not divide the reset grid of 12"):
        mimo_ssm(
            u,
            MIMOParameters(*leaves[:6]),
            resets=torch.zeros(BATCH, 2, dtype=torch.bool),
            edges=range(0, 24, 12),
            chunk_size=8,
        )
