"""The three forms of the LTI SSM agree: values, states and gradients."""

import itertools

import pytest
import torch
from torch import Tensor

from pretrain.ops.lti_ssm import SSMParameters, lti_ssm, lti_ssm_fft, lti_ssm_naive

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
        draw(CHANNELS) - 3,
        draw(CHANNELS, MODES) * 0.3 - 0.7,
        3 * torch.arange(MODES, dtype=torch.float64) + 0.1 * draw(CHANNELS, MODES),
        draw(CHANNELS, MODES, 2),
        draw(CHANNELS),
    ]
    if carried:
        leaves.append(draw(BATCH, CHANNELS, 2, MODES))
    leaves = [leaf.to(wide).requires_grad_() for leaf in leaves]
    return draw(BATCH, length, CHANNELS).to(dtype).requires_grad_(), leaves


def evaluate(form, u, leaves, resets, edges) -> list[Tensor]:
    """y, final state, and the gradients of a fixed functional of both."""
    state = leaves[5] if len(leaves) > 5 else None
    y, after = form(
        u, SSMParameters(*leaves[:5]), state, resets=resets, edges=edges, chunk_size=CHUNK
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
@pytest.mark.parametrize("form", [lti_ssm, lti_ssm_fft], ids=["chunked", "fft"])
@pytest.mark.parametrize("length", [1, 7, 8, 24, 61])
def test_fast_forms_equal_the_recurrence(
    form, length: int, first_edge: int | None, carried: bool, dtype: torch.dtype
) -> None:
    u, leaves = problem(length, dtype, carried)
    resets, edges = None, range(0)
    if first_edge is not None:
        edges = range(first_edge, max(length, first_edge), 2 * CHUNK)
        generator = torch.Generator().manual_seed(1)
        resets = torch.rand(BATCH, len(edges), generator=generator) < 0.5
        if not edges:
            resets = None
    got = evaluate(form, u, leaves, resets, edges)
    # bf16 is judged by the recurrence in fp32 on the same, already rounded, inputs.
    wide = u.detach().to(leaves[0].dtype).requires_grad_()
    want = evaluate(lti_ssm_naive, wide, leaves, resets, edges)
    if dtype == torch.bfloat16:
        # Gradients are judged together: a single one may be a sum of few terms that cancel.
        got, want = ([*x[:2], torch.cat([g.flatten().float() for g in x[2:]])] for x in (got, want))
    for a, b in zip(got, want, strict=True):
        error = (a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30)
        assert error < BOUNDS[dtype]
    assert got[0].dtype == dtype
    assert got[1].dtype == leaves[0].dtype


@pytest.mark.parametrize("output", [0, 1], ids=["y", "state"])
def test_a_gradient_of_one_output_alone(output: int) -> None:
    u, leaves = problem(21, torch.float64, True)
    got, want = (
        torch.autograd.grad(
            form(u, SSMParameters(*leaves[:5]), leaves[5], chunk_size=CHUNK)[output].sin().sum(),
            [u, *leaves],
            materialize_grads=True,
        )
        for form in (lti_ssm, lti_ssm_naive)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_chunk_size_changes_nothing_but_rounding() -> None:
    u, leaves = problem(50, torch.float64, True)
    outputs = [
        lti_ssm(u, SSMParameters(*leaves[:5]), leaves[5], chunk_size=size)[0]
        for size in (1, 3, 16, 64)
    ]
    for a, b in itertools.pairwise(outputs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_fft_form_is_linear_and_not_circular() -> None:
    """With an FFT shorter than 2T the last input would show in the first output."""
    u, leaves = problem(33, torch.float64, False)
    late = u.detach().clone()
    late[:, -1] += 100
    parameters = SSMParameters(*leaves[:5])
    y, y_late = (lti_ssm_fft(x, parameters)[0] for x in (u, late))
    torch.testing.assert_close(y[:, :-1], y_late[:, :-1], rtol=0, atol=1e-12 * 100)


def test_chunks_that_straddle_reset_edges_are_refused() -> None:
    u, leaves = problem(24, torch.float64, False)
    with pytest.raises(ValueError, match="does not divide the reset grid of 12"):
        lti_ssm(
            u,
            SSMParameters(*leaves[:5]),
            resets=torch.zeros(BATCH, 2, dtype=torch.bool),
            edges=range(0, 24, 12),
            chunk_size=8,
        )
