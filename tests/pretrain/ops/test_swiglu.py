"""A SwiGLU's products and, on a GPU, their hand-written derivatives equal the definition."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops import swiglu as module
from pretrain.ops import swiglu_quack
from pretrain.ops.swiglu import (
    Gated,
    fused_swiglu_linear,
    gate_up_linear,
    swiglu_linear,
    swiglu_linear_naive,
)
from pretrain.ops.swiglu_quack import (
    ENOUGH_TOKENS,
    QUACK_INSTALLED,
    linear_swiglu_in_turns,
    quack_serves,
    swiglu_linear_in_turns,
)

# Of the sum of the magnitudes of what is added up. bf16: autograd on a CPU rounds three times on
# the way to a result, by 2^-8 each, the kernels twice; Triton's interpreter rounds towards zero, by
# 2^-7. fp32: a sum's order, and exp.
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1.2e-2}
WIDTHS = [1, 7, 1024, 2752]  # odd ones, one block, the last block not full
D = 16

every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def leaves(width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(3, 5, 2 * width, generator=generator)
    x[1, 1, 0] = -1e4  # exp(1e4) is infinite
    weight = torch.randn(D, width, generator=generator)
    return [leaf.to(device, dtype).requires_grad_() for leaf in (x, weight)]


def magnitudes_of_silu(gate: Tensor) -> tuple[Tensor, Tensor]:
    """And of the terms of its derivative."""
    sigmoid = gate.sigmoid()
    silu = (gate * sigmoid).abs()
    return silu, sigmoid + silu * (1 - sigmoid)


def check_against_the_definition(width: int, dtype: torch.dtype, device: str) -> None:
    x, weight = leaves(width, dtype, device)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    want = swiglu_linear_naive(*wide)
    got = swiglu_linear(Gated(x), weight)
    assert got.dtype == dtype

    gate, up = (half.detach() for half in wide[0].chunk(2, -1))
    magnitudes, (silu, slope) = wide[1].detach().abs(), magnitudes_of_silu(gate)
    triples = [(got, want, (silu * up.abs()) @ magnitudes.T)]
    factor = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(device)
    for d in (factor, factor.sum(0).expand_as(want)):  # of the second, memory overlaps
        d = d.to(dtype)
        d_hidden = d.double().abs() @ magnitudes
        scales = (
            torch.cat([d_hidden * up.abs() * slope, d_hidden * silu], -1),
            torch.einsum("abd,abf->df", d.double().abs(), silu * up.abs()),
        )
        triples += zip(
            torch.autograd.grad(got, (x, weight), d, retain_graph=True),
            torch.autograd.grad(want, wide, d.double(), retain_graph=True),
            scales,
            strict=True,
        )
    for a, b, scale in triples:
        assert a.isfinite().all()
        assert ((a.double() - b).abs() <= BOUNDS[dtype] * scale).all()


@every_dtype
def test_values_and_gradients_equal_the_definition(dtype: torch.dtype) -> None:
    check_against_the_definition(7, dtype, "cpu")


@pytest.mark.triton
@every_dtype
@pytest.mark.parametrize("width", [1, 7, 1030])
def test_interpreted_kernels_equal_the_definition(dtype: torch.dtype, width: int) -> None:
    from pretrain.ops.swiglu_kernels import swiglu_backward, swiglu_forward

    x = leaves(width, dtype, "cpu")[0].detach()
    wide = x.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    want = F.silu(gate) * up
    d = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (d_want,) = torch.autograd.grad(want, wide, d.double())

    (silu, slope), above = magnitudes_of_silu(gate.detach()), d.double().abs()
    scale = silu * up.detach().abs()
    d_scale = torch.cat([above * up.detach().abs() * slope, above * silu], -1)
    d_got, again = swiglu_backward(d, x)
    triples = [(swiglu_forward(x), want, scale), (again, want, scale), (d_got, d_want, d_scale)]
    for a, b, size in triples:
        assert a.dtype == dtype
        assert a.isfinite().all()
        assert ((a.double() - b).abs() <= BOUNDS[dtype] * size).all()


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_the_kernels_equal_the_definition(dtype: torch.dtype, width: int) -> None:
    check_against_the_definition(width, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_the_operator_keeps_the_rules_of_torch_library(turned: bool) -> None:
    x, weight = (leaf.detach() for leaf in leaves(7, torch.float32, "cuda"))
    x = (x.transpose(0, 1) if turned else x).requires_grad_()
    torch.library.opcheck(fused_swiglu_linear, (x, weight.requires_grad_()))


@pytest.mark.gpu
def test_compiled_it_stays_one_operator_and_as_right() -> None:
    x, weight = leaves(64, torch.float32, "cuda")

    def form(x: Tensor, weight: Tensor) -> Tensor:
        return swiglu_linear(Gated(x), weight)

    compiled = torch.compile(form, fullgraph=True, dynamic=False)
    d = torch.randn(3, 5, D, device="cuda")
    for a, b in zip(
        (compiled(x, weight), *torch.autograd.grad(compiled(x, weight), (x, weight), d)),
        (form(x, weight), *torch.autograd.grad(form(x, weight), (x, weight), d)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_only_what_it_is_given_is_kept_for_the_backward() -> None:
    x, weight = leaves(64, torch.bfloat16, "cuda")
    kept = kept_shapes(lambda: swiglu_linear(Gated(x), weight))
    assert kept == [tuple(x.shape), tuple(weight.shape)]


# Both products together. In bf16 gate and up, silu(gate) * up, their gradients and every result are
# rounded once, which makes 4e-3 of the norm; two rows that changed places would make 1.
PRODUCTS_BOUND = 1e-2


def mlp(x: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> Tensor:
    return swiglu_linear(gate_up_linear(x, gate_up_weight), down_weight)


def mlp_leaves(tokens: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, tokens // 2, D), (2 * width, D), (D, width))
    # Gates of about 1: every part of silu is seen.
    scales = (1, D**-0.5, width**-0.5)
    drawn = [s * torch.randn(*n, generator=generator) for n, s in zip(shapes, scales, strict=True)]
    # So that all dtypes begin with the same numbers.
    return [leaf.bfloat16().to(device, dtype).requires_grad_() for leaf in drawn]


def check_products(form: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Values, and the gradients of x and both weights, against the definition in fp64."""
    x, gate_up, down = wide = [leaf.detach().double().requires_grad_() for leaf in inputs]
    want = swiglu_linear_naive(x @ gate_up.T, down)
    got = form(*inputs)
    d = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(want.device)
    d = d.to(got.dtype)
    grads = torch.autograd.grad(got, inputs, d), torch.autograd.grad(want, wide, d.double())
    for a, b in zip((got, *grads[0]), (want, *grads[1]), strict=True):
        assert (a.double() - b).norm() <= PRODUCTS_BOUND * b.norm()


def kept_shapes(form: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
    ):
        form()
    return kept


@pytest.fixture
def quack_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """quack's two products as it defines them (`gemm_act_ref`, `gemm_dact_ref`): pairs."""

    def gemm_gated(a: Tensor, b: Tensor, *, activation: str, tuned: bool) -> tuple[Tensor, Tensor]:
        assert a.data_ptr() % 16 == b.data_ptr() % 16 == 0
        pre = a.float() @ b.float()
        return pre.to(a.dtype), (F.silu(pre[:, ::2]) * pre[:, 1::2]).to(a.dtype)

    def gemm_dgated(
        a: Tensor, b: Tensor, pre: Tensor, *, activation: str, tuned: bool, config: object
    ) -> tuple[Tensor, Tensor]:
        assert not any(x.data_ptr() % 16 for x in (a, b, pre))
        gate, up = pre.float().unflatten(-1, (-1, 2)).unbind(-1)
        d, sigmoid, silu = a.float() @ b.float(), gate.sigmoid(), F.silu(gate)
        d_pre = torch.stack([d * up * (sigmoid + silu * (1 - sigmoid)), d * silu], -1).flatten(1)
        return d_pre.to(a.dtype), (silu * up).to(a.dtype)

    interface = ModuleType("quack.gemm_interface")
    interface.gemm_gated, interface.gemm_dgated = gemm_gated, gemm_dgated  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", interface)
    monkeypatch.setattr(module, "quack_serves", lambda x, weight: True)
    monkeypatch.setattr(swiglu_quack, "_narrow_tiles", lambda: None)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.usefixtures("quack_by_definition")
def test_gate_and_up_taking_turns_are_the_definition(compiled: bool) -> None:
    torch._dynamo.reset()
    form = torch.compile(mlp, fullgraph=True, backend="aot_eager") if compiled else mlp
    inputs = mlp_leaves(10, 24, torch.bfloat16, "cpu")
    check_products(form, inputs)
    assert [t.grad_fn for t in gate_up_linear(*inputs[:2])][1] is None  # no gradient, no zeros


@pytest.mark.usefixtures("quack_by_definition")
def test_what_quack_reads_may_begin_anywhere() -> None:
    inputs = [
        torch.cat([t.new_zeros(1), t.detach().flatten()])[1:].view_as(t).requires_grad_()
        for t in mlp_leaves(10, 24, torch.bfloat16, "cpu")
    ]
    check_products(mlp, inputs)


@pytest.mark.usefixtures("quack_by_definition")
def test_quacks_operators_keep_the_rules_of_torch_library() -> None:
    x, gate_up, down = mlp_leaves(10, 24, torch.bfloat16, "cpu")
    rows = x.detach().flatten(0, -2).requires_grad_()
    torch.library.opcheck(linear_swiglu_in_turns, (rows, gate_up))
    pre, hidden = (t.detach() for t in linear_swiglu_in_turns(rows, gate_up))
    torch.library.opcheck(swiglu_linear_in_turns, (pre.requires_grad_(), hidden, down))


@pytest.mark.usefixtures("quack_by_definition")
def test_quacks_products_keep_no_hidden_activations() -> None:
    x, gate_up, down = mlp_leaves(10, 24, torch.bfloat16, "cpu")
    kept = kept_shapes(lambda: mlp(x, gate_up, down))
    assert kept == [(10, D), (48, D), (2, 5, 48), (D, 24)]


@pytest.mark.usefixtures("quack_by_definition")
def test_a_compiler_writes_its_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first product reads is what the gradient of its weight does."""
    read, interface = [], sys.modules["quack.gemm_interface"]
    gemm_gated = interface.gemm_gated
    monkeypatch.setattr(
        interface, "gemm_gated", lambda a, b, **others: read.append(a) or gemm_gated(a, b, **others)
    )
    torch._dynamo.reset()
    x, gate_up, down = mlp_leaves(10, 24, torch.bfloat16, "cpu")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.compile(lambda x: mlp(x.sin(), gate_up, down), fullgraph=True, dynamic=False)(x)
    (rows,) = read
    assert sum(t.shape == rows.shape for t in kept) == 1
    assert any(t.data_ptr() == rows.data_ptr() for t in kept)


@pytest.mark.usefixtures("quack_by_definition")
def test_quacks_products_take_autocasts_dtype_and_give_weights_theirs() -> None:
    inputs = mlp_leaves(10, 24, torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(*inputs)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert [leaf.grad.dtype for leaf in inputs] == 3 * [torch.float32]


def test_quack_serves_bf16_on_hopper_in_rows_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU(Tensor):
        is_cuda = True

    def serves(tokens=ENOUGH_TOKENS, width=8, d_model=8, dtype=torch.bfloat16) -> bool:
        x = torch.empty(tokens, d_model, dtype=dtype).as_subclass(OnGPU)
        return quack_serves(x, torch.empty(2 * width, d_model))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(swiglu_quack, "QUACK_INSTALLED", True)
    assert serves()
    assert not serves(tokens=ENOUGH_TOKENS - 1)
    assert not serves(width=12)
    assert not serves(d_model=12)
    assert not serves(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert serves(dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not serves()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("width", [24, 2752])
@pytest.mark.parametrize(
    "quack", [False, True][: 1 + QUACK_INSTALLED], ids=lambda quack: "quack" if quack else "triton"
)
def test_both_products_equal_the_definition(
    quack: bool, width: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu_quack, "QUACK_INSTALLED", quack)
    torch._dynamo.reset()
    inputs = mlp_leaves(ENOUGH_TOKENS + 10, width, torch.bfloat16, "cuda")
    hopper = torch.cuda.get_device_capability()[0] == 9
    assert (gate_up_linear(*inputs[:2]).hidden is not None) == (quack and hopper)
    form = torch.compile(mlp, fullgraph=True, dynamic=False) if compiled else mlp
    check_products(form, inputs)
