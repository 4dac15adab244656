"""The chunked forms of SSD equal its recurrence: values, states and gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.mixers.mamba2 import Mamba2
from pretrain.models.block import Block
from pretrain.ops.ssd import fused_ssd, has_kernels, ssd, ssd_naive, ssd_whole

BATCH, HEADS, WIDTH, GROUPS, STATE, CHUNK = 2, 4, 3, 2, 5, 8

# fp64 and fp32: order of summation. bf16: operands have 8 bits; sums and carries are fp32.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def problem(length: int, dtype: torch.dtype, carried: bool, groups: int = GROUPS) -> list[Tensor]:
    """u, step, log_decay, b, c, skip and the state; all but u, b and c in at least fp32."""
    generator = torch.Generator().manual_seed(length)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    steps = draw(BATCH, length, HEADS, dtype=torch.float64)
    leaves = [
        draw(BATCH, length, HEADS, WIDTH, dtype=dtype),
        draw(BATCH, length, HEADS, dtype=wide),
        (-(2 * steps - 2).exp()).detach().to(wide).requires_grad_(),  # 1e-4 to 10 per token
        draw(BATCH, length, groups, STATE, dtype=dtype),
        draw(BATCH, length, groups, STATE, dtype=dtype),
        draw(HEADS, dtype=wide),
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
    leaves[2] = leaves[2].clone()
    leaves[2][:, : length // 2] = -1000.0
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


# The operator, interpreted on a CPU or on a GPU. Differences of sums of fp32 cost it digits; the
# narrow types round what is written, read and returned. The interpreter has no products in bf16.
OPERATOR_BOUNDS = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def of_one_projection(
    u: Tensor,
    step: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    *state: Tensor,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """The operator on u, b and c that are views of one tensor, as a projection leaves them."""
    flat = [x.flatten(2) for x in (u, b, c)]
    parts = torch.cat(flat, 2).split([x.shape[2] for x in flat], 2)
    u, b, c = (part.unflatten(2, x.shape[2:]) for part, x in zip(parts, (u, b, c), strict=True))
    return fused_ssd(u, step, log_decay, b, c, skip, *state, **others)


def assert_near(got: list[Tensor], want: list[Tensor], bound: float) -> None:
    errors = [
        ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        for a, b in zip(got, want, strict=True)
    ]
    assert all(error < bound for error in errors), str(errors)  # NaN fails


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("first_edge", [None, 0, 5], ids=lambda e: f"edge {e}")
@pytest.mark.parametrize(("length", "groups"), [(1, 1), (61, 1), (61, 2), (64, 2)])
def test_interpreted_operator_equals_the_recurrence(
    length: int,
    groups: int,
    first_edge: int | None,
    carried: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pretrain.ops import ssd_kernels

    # Several chunks, and with one group several programs for its heads.
    monkeypatch.setattr(ssd_kernels, "OUTPUTS", ssd_kernels.OUTPUTS._replace(chunk=32, heads=2))
    monkeypatch.setattr(ssd_kernels, "GRADIENTS", ssd_kernels.GRADIENTS._replace(chunk=16, heads=2))
    leaves = problem(length, dtype, carried, groups)
    resets, edges = None, range(0)
    if first_edge is not None:
        edges = range(first_edge, max(length, first_edge), 7)  # anywhere in a chunk
        resets = torch.rand(BATCH, len(edges), generator=torch.Generator().manual_seed(1)) < 0.5
    got = evaluate(of_one_projection, leaves, resets, edges)
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    want = evaluate(ssd_naive, wide, resets, edges)
    assert [x.dtype for x in got] == [dtype, torch.float32, *(leaf.dtype for leaf in leaves)]
    assert_near(got, want, OPERATOR_BOUNDS[dtype])


@pytest.mark.triton
def test_interpreted_operator_takes_any_gradient() -> None:
    """Of the outputs alone, spread over memory that overlaps."""
    leaves = problem(20, torch.float32, True)
    gradients = [
        torch.autograd.grad(form(*leaves)[0].sum(), leaves) for form in (fused_ssd, ssd_naive)
    ]
    assert_near(*gradients, OPERATOR_BOUNDS[torch.float32])


@pytest.mark.triton
def test_a_reset_lets_nothing_through() -> None:
    leaves = [x.detach() for x in problem(40, torch.float32, True)]
    resets = torch.ones(BATCH, 1, dtype=torch.bool)
    y, after = fused_ssd(*leaves, resets=resets, edges=range(13, 40, 32))
    leaves[0][:, :13] = 1e9
    leaves[6] += 1e9
    changed, after_changed = fused_ssd(*leaves, resets=resets, edges=range(13, 40, 32))
    assert torch.equal(changed[:, 13:], y[:, 13:])
    assert torch.equal(after_changed, after)


def check_that_nan_is_passed_on(dtype: torch.dtype, device: str) -> None:
    leaves = [x.detach().to(device) for x in problem(20, dtype, False)]
    leaves[2][0, 3, 1] = torch.nan
    y, after = fused_ssd(*leaves)
    assert y[0, 3:, 1].isnan().all()
    assert after[0, 1].isnan().all()
    assert y[0, :, 0].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.triton
def test_interpreted_operator_passes_nan_on() -> None:
    check_that_nan_is_passed_on(torch.float32, "cpu")


@pytest.mark.gpu
def test_the_operator_passes_nan_on() -> None:
    """A GPU's maximum would take it for the least decay."""
    check_that_nan_is_passed_on(torch.bfloat16, "cuda")


@pytest.mark.triton
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_the_backward_is_given_the_inputs_and_nothing_else(carried: bool) -> None:
    leaves = problem(20, torch.float32, carried)
    kept: list[tuple[int, ...]] = []

    def note(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        fused_ssd(*leaves)
    assert kept == [tuple(leaf.shape) for leaf in leaves]


def check_the_rules_of_torch_library(dtype: torch.dtype, device: str) -> None:
    leaves = [x.detach().to(device) for x in problem(20, dtype, True)]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for state in (leaves[6], None):
        inputs = [x.requires_grad_() for x in leaves[:6]]
        torch.library.opcheck(ssd_whole, (*inputs, state), test_utils=tests)


@pytest.mark.triton
def test_interpreted_operator_keeps_the_rules_of_torch_library() -> None:
    check_the_rules_of_torch_library(torch.float32, "cpu")


@pytest.mark.gpu
def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    check_the_rules_of_torch_library(torch.bfloat16, "cuda")


REFUSED = ((64, 256), (32, 256), (48, 128), (128, 128), (64, 96))


def test_other_sizes_than_the_kernels_were_tested_at_take_the_chunked_form() -> None:
    assert all(has_kernels(*sizes) for sizes in ((64, 128), (128, 64), (32, 32)))
    assert not any(has_kernels(*sizes) for sizes in REFUSED)


def real_problem(
    length: int, width: int, d_state: int, groups: int, dtype: torch.dtype
) -> list[Tensor]:
    """Two sequences, 32 heads; decays as Mamba-2 begins."""
    heads = 32
    generator = torch.Generator("cuda").manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    steps = (draw(2, length, heads) - 4).exp()
    a = 16 * torch.rand(heads, generator=generator, device="cuda")
    u = draw(2, length, heads, width).to(dtype)
    b, c = (draw(2, length, groups, d_state).to(dtype) for _ in range(2))
    inputs = (u, steps, -steps * a, b, c, draw(heads), draw(2, heads, width, d_state))
    return [x.requires_grad_() for x in inputs]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("length", "width", "d_state", "groups"),
    [
        (1024, 64, 128, 1),
        (1000, 64, 128, 2),
        (1, 64, 128, 1),
        (130, 32, 32, 1),
        (200, 128, 64, 4),
    ],
)
def test_kernels_equal_the_chunked_form_in_fp64(
    length: int, width: int, d_state: int, groups: int, documents: bool, dtype: torch.dtype
) -> None:
    leaves = real_problem(length, width, d_state, groups, dtype)
    edges = range(0, length, 64) if documents else range(0)
    resets = torch.rand(2, len(edges), device="cuda") < 0.3 if documents else None
    above = [torch.randn(s.shape, device="cuda").to(dtype) for s in (leaves[0], leaves[6])]

    def found(inputs: list[Tensor]) -> list[Tensor]:
        results = ssd(*inputs, resets=resets, edges=edges)
        over = [d.to(x.dtype) for d, x in zip(above, results, strict=True)]
        return [*results, *torch.autograd.grad(results, inputs, over)]

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    assert_near(found(leaves), found(wide), OPERATOR_BOUNDS[dtype])


def check_compiled(
    form: Callable[..., Any],
    backend: str,
    inputs: list[Tensor],
    bound: float,
    parameters: Sequence[Tensor] = (),
) -> None:
    """In one graph, and to the same numbers; parameters' gradients are judged together."""
    torch._dynamo.reset()
    compiled = torch.compile(form, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for one in (form, compiled):
        values = one(*inputs)
        loss = sum(value.square().sum() for value in values)
        gradients = torch.autograd.grad(loss, [*inputs, *parameters])
        ours, theirs = gradients[: len(inputs)], gradients[len(inputs) :]
        together = [torch.cat([gradient.flatten() for gradient in theirs])] if theirs else []
        results.append([*values, *ours, *together])
    assert_near(results[1], results[0], bound)


@pytest.mark.triton
def test_traced_it_computes_the_same() -> None:
    leaves = problem(20, torch.float32, True)
    check_compiled(of_one_projection, "aot_eager", leaves, 1e-6)


@pytest.mark.gpu
def test_a_compiled_block_computes_the_same() -> None:
    """At the sizes of mamba2_350m, in bf16, with a state and resets."""
    torch.manual_seed(0)
    mixer = Mamba2(1024, chunk_size=64)
    block = Block("mamba2", mixer, d_model=1024, d_ff=1984, mlp="swiglu").cuda()
    x = torch.randn(2, 320, 1024, device="cuda", requires_grad=True)
    resets = torch.rand(2, 5, device="cuda") < 0.4
    state = mixer.init_state(2, device=x.device, dtype=torch.bfloat16)

    def form(x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cuda", torch.bfloat16):
            out = block(x, state, resets)
        return out.stream, out.state.ssm

    check_compiled(form, "inductor", [x], 2e-2, list(block.parameters()))
