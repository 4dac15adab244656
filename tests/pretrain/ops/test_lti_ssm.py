"""The three forms of the LTI SSM agree: values, states and gradients."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pretrain.ops import lti_ssm as module
from pretrain.ops.lti_ssm import SSMParameters, lti_ssm, lti_ssm_fft, lti_ssm_naive
from pretrain.ops.ssm_chunks import ssm_chunks_of_modes
from tests.pretrain.ops.test_ssd import check_compiled

CHANNELS, MODES, BATCH, CHUNK = 3, 4, 2, 8

# fp64 and fp32: order of summation. bf16: operands have 8 bits; sums and carries are fp32.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(
    length: int, dtype: torch.dtype, carried: bool, modes: int = MODES, *, real: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """u in `dtype`, and the parameters and the state in at least fp32; as S4D-Lin or S4D-Real."""
    generator = torch.Generator().manual_seed(length)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = torch.arange(modes, dtype=torch.float64)
    leaves = [
        draw(CHANNELS) - 3,
        draw(CHANNELS, modes) * 0.3 + ((n + 1).log() if real else -0.7),
        torch.zeros(CHANNELS, modes) if real else 3 * n + 0.1 * draw(CHANNELS, modes),
        draw(CHANNELS, modes, 2),
        draw(CHANNELS),
    ]
    if carried:
        leaves.append(draw(BATCH, CHANNELS, 2, modes))
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


def assert_equals_the_recurrence(
    form: Callable[..., tuple[Tensor, Tensor]],
    u: Tensor,
    leaves: list[Tensor],
    first_edge: int | None,
    bound: float,
    *,
    together: bool,
) -> None:
    """With `together` all gradients are one vector: a single one may be a sum that cancels."""
    length, dtype = u.shape[1], u.dtype
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
    assert got[0].dtype == dtype
    assert got[1].dtype == leaves[0].dtype
    if together:
        flat = ([g.flatten().to(wide.dtype) for g in x[2:]] for x in (got, want))
        got, want = ([*x[:2], torch.cat(g)] for x, g in zip((got, want), flat, strict=True))
    for a, b in zip(got, want, strict=True):
        error = (a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-30)
        assert error < bound  # NaN fails


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("first_edge", [None, 0, 5, 16], ids=lambda e: f"edge {e}")
@pytest.mark.parametrize("form", [lti_ssm, lti_ssm_fft], ids=["chunked", "fft"])
@pytest.mark.parametrize("length", [1, 7, 8, 24, 61])
def test_fast_forms_equal_the_recurrence(
    form, length: int, first_edge: int | None, carried: bool, dtype: torch.dtype
) -> None:
    u, leaves = problem(length, dtype, carried)
    narrow = dtype == torch.bfloat16
    assert_equals_the_recurrence(form, u, leaves, first_edge, BOUNDS[dtype], together=narrow)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("form", [lti_ssm, lti_ssm_fft], ids=["chunked", "fft"])
@pytest.mark.parametrize(
    ("modes", "real"),
    [(4, True), (8, False), (64, False), (64, True)],
    ids=["4 real", "8 complex", "64 complex", "64 real"],
)
def test_they_do_with_any_modes(form, modes: int, real: bool, dtype: torch.dtype) -> None:
    u, leaves = problem(61, dtype, True, modes, real=real)
    bound = BOUNDS[dtype]
    if dtype == torch.float32 and modes == 64 and not real:
        bound = 3e-5  # modes turn by tens of radians a token, of which fp32 keeps some 1e-6
    assert_equals_the_recurrence(form, u, leaves, 5, bound, together=dtype != torch.float64)


@pytest.mark.parametrize("output", [0, 1], ids=["y", "state"])
def test_a_gradient_of_one_output_alone(output: int) -> None:
    check_gradients_of_one(output)


def check_gradients_of_one(output: int) -> None:
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


# In Triton's interpreter: the operator that takes narrow types on a GPU.


@pytest.fixture
def corner() -> float:
    """What stands where `form_matrix` writes nothing. Nothing may read it."""
    return torch.nan


@pytest.fixture
def formed_by_kernel(monkeypatch: pytest.MonkeyPatch, corner: float) -> Iterator[None]:
    """`lti_ssm` runs the operator: fails where it did not."""
    from pretrain.ops import ssm_operator_kernels as kernels

    form_matrix, calls = kernels.form_matrix, []

    def filled(decay: Tensor, *others) -> tuple[Tensor, Tensor]:
        calls.append(1)
        matrix, chunk_decay = form_matrix(decay, *others)
        width = 2 * decay.shape[1]
        matrix[:, -width:, -width:] = corner
        return matrix, chunk_decay

    monkeypatch.setattr(kernels, "form_matrix", filled)
    monkeypatch.setattr(module, "_formed_by_torch", module._formed_by_kernel)
    yield
    assert calls


@pytest.mark.triton
@pytest.mark.usefixtures("formed_by_kernel")
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("first_edge", [None, 5], ids=lambda e: f"edge {e}")
@pytest.mark.parametrize(
    ("length", "modes", "real"), [(1, 4, False), (8, 4, False), (61, 4, False), (24, 5, True)]
)
def test_interpreted_operator_equals_the_recurrence(
    length: int, modes: int, real: bool, first_edge: int | None, dtype: torch.dtype
) -> None:
    u, leaves = problem(length, dtype, True, modes, real=real)
    narrow = dtype == torch.bfloat16
    assert_equals_the_recurrence(lti_ssm, u, leaves, first_edge, BOUNDS[dtype], together=narrow)


@pytest.mark.triton
@pytest.mark.usefixtures("formed_by_kernel")
@pytest.mark.parametrize("output", [0, 1], ids=["y", "state"])
def test_interpreted_operator_takes_a_gradient_of_one_output_alone(output: int) -> None:
    check_gradients_of_one(output)


@pytest.mark.triton
@pytest.mark.usefixtures("formed_by_kernel")
def test_traced_it_computes_the_same() -> None:
    """In whole chunks and a shorter one, with resets."""
    u, leaves = problem(21, torch.bfloat16, True)
    resets = torch.tensor([[True, False], [False, True]])

    def form(u: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        parameters, state = SSMParameters(*leaves[:5]), leaves[5]
        return lti_ssm(
            u, parameters, state, resets=resets, edges=range(0, 21, 16), chunk_size=CHUNK
        )

    check_compiled(form, "aot_eager", [u, *leaves], 1e-6)


@pytest.mark.triton
@pytest.mark.usefixtures("formed_by_kernel")
# The operator is compared with itself, traced, in all that it returns: M's corner has to be equal.
@pytest.mark.parametrize("corner", [0.0])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_interpreted_operator_keeps_the_rules_of_torch_library(documents: bool) -> None:
    u, (log_dt, log_a, angle, c, skip, state) = problem(3 * CHUNK, torch.bfloat16, True)
    decay = -(log_dt.exp().unsqueeze(-1) * log_a.exp())
    inputs = [u, decay, angle, *c.unbind(-1), skip, state.transpose(-1, -2).transpose(0, 1)]
    inputs = [part.detach().requires_grad_() for part in inputs]
    keep = torch.tensor([[True, False, True], [False, True, True]]) if documents else None
    torch.library.opcheck(ssm_chunks_of_modes, (*inputs, keep, CHUNK))
