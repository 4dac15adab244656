"""MEGA's damped EMA in chunks equals the loop: values, states and gradients."""

import pytest
import torch
from torch import Tensor

from pretrain.ops.damped_ema import EMAParameters, damped_ema, damped_ema_naive

CHANNELS, MODES, BATCH, CHUNK = 3, 4, 2, 8

# fp64 and fp32: order of summation. bf16: operands have 8 bits; sums and carries are fp32.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(length: int, dtype: torch.dtype, carried: bool) -> tuple[Tensor, list[Tensor]]:
    """u in `dtype`, and the parameters and the state in at least fp32."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(CHANNELS, MODES)] * 4 + [(CHANNELS,)] + [(BATCH, CHANNELS, MODES)] * carried
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(wide).requires_grad_()
        for shape in shapes
    ]
    u = torch.randn(BATCH, length, CHANNELS, generator=generator, dtype=torch.float64)
    return u.to(dtype).requires_grad_(), leaves


def evaluate(form, u, leaves, resets, edges) -> list[Tensor]:
    state = leaves[5] if len(leaves) > 5 else None
    y, after = form(
        u, EMAParameters(*leaves[:5]), state, resets=resets, edges=edges, chunk_size=CHUNK
    )
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (t.to(after.dtype) * torch.randn(t.shape, generator=generator, dtype=after.dtype)).sum()
        for t in (y, after)
    )
    return [y, after, *torch.autograd.grad(loss, [u, *leaves])]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("first_edge", [None, 0, 5, 16], ids=lambda e: f"edge {e}")
@pytest.mark.parametrize("length", [1, 8, 61])
def test_chunks_equal_the_loop(
    length: int, first_edge: int | None, carried: bool, dtype: torch.dtype
) -> None:
    u, leaves = problem(length, dtype, carried)
    resets, edges = None, range(0)
    if first_edge is not None and first_edge < length:
        edges = range(first_edge, length, 2 * CHUNK)
        generator = torch.Generator().manual_seed(1)
        resets = torch.rand(BATCH, len(edges), generator=generator) < 0.5
    got = evaluate(damped_ema, u, leaves, resets, edges)
    # bf16 is judged by the loop in fp32 on the same, already rounded, inputs.
    wide = u.detach().to(leaves[0].dtype).requires_grad_()
    want = evaluate(damped_ema_naive, wide, leaves, resets, edges)
    if dtype == torch.bfloat16:
        # Gradients are judged together: a single one may be a sum of few terms that cancel.
        got, want = ([*x[:2], torch.cat([g.flatten().float() for g in x[2:]])] for x in (got, want))
    for a, b in zip(got, want, strict=True):
        assert (a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30) < BOUNDS[dtype]
    assert got[0].dtype == dtype


def test_slow_and_fast_modes_stay_exact_and_finite() -> None:
    """q = 1 - 1e-9 remembers a million tokens; both sigmoids at 1 would make log q infinite."""
    delta = torch.tensor([[-20.7, 40.0]])
    ones, zero = torch.ones(1, 2), torch.zeros(1)
    parameters = EMAParameters(delta, delta + 20.7 + 20, ones, ones, zero)
    u = torch.randn(1, 100, 1, generator=torch.Generator().manual_seed(0))
    y, state = damped_ema(u, parameters)
    assert y.isfinite().all()
    # The slow mode has summed all inputs, the fast one holds the last.
    torch.testing.assert_close(state[0, 0, 0], u.sum(), rtol=0, atol=1e-5)
    torch.testing.assert_close(state[0, 0, 1], u[0, -1, 0], rtol=0, atol=1e-5)
