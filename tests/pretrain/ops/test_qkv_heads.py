"""Prepared queries and keys, and the gradient of their projection, equal the definition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from pretrain.ops.qkv_heads import (
    fused_prepare_qkv,
    prepare_parts,
    prepare_parts_backward,
    prepare_qkv,
)

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    batch: int = 2
    length: int = 7
    parts: int = 3
    heads: int = 3
    width: int = 8
    cached: int = 0
    scaled: bool = True
    base: float | None = 100.0
    start: int = 0
    keep: int = 5


CASES = {
    "norms and positions": Case(),
    "positions": Case(scaled=False),
    "norms": Case(base=None),
    "neither": Case(scaled=False, base=None),
    "four parts": Case(parts=4, heads=4, width=6),
    "a cache": Case(cached=5),
    "a cache, one token": Case(length=1, cached=5),
    "no cache, fewer than kept": Case(length=3),
    "nothing kept, later positions": Case(keep=0, start=11),
    "one head of two elements": Case(batch=1, heads=1, width=2),
}
GPU_CASES = CASES | {
    "16 heads of 64": Case(length=131, heads=16, width=64, keep=128, base=1e4),
    "12 heads of 128, 4 parts": Case(length=33, parts=4, heads=12, width=128, keep=16),
    "5 heads of 32, a cache": Case(length=65, heads=5, width=32, cached=16, keep=96),
    "3 heads of 96": Case(length=17, heads=3, width=96, scaled=False),
}
every_case = pytest.mark.parametrize("name", CASES)
every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def definition(
    qkv: Tensor, cache: Any, scale: Tensor | None, base: float | None, start: int, keep: int
) -> list[Tensor]:
    """y = scale x / |x| exp(i t base^(-2j/K)), pairs (j, j + K/2) as complex numbers."""
    q, k, v, *others = (qkv[:, :, part] for part in range(qkv.shape[2]))
    if cache is not None:
        k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)

    def placed(x: Tensor, first: int) -> Tensor:
        if scale is not None:
            x = x / x.square().sum(-1, keepdim=True).sqrt()
        if base is None:
            return x
        half = x.shape[-1] // 2
        frequency = base ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
        time = torch.arange(first, first + x.shape[1], dtype=x.dtype, device=x.device)
        angle = time[:, None, None] * frequency
        z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
        return torch.cat([z.real, z.imag], -1)

    factor = 1.0 if scale is None else scale[:, None]
    kept = [F.pad(part, (0, 0, 0, 0, keep, 0))[:, part.shape[1] :] for part in (k, v)]
    cached = k.shape[1] - q.shape[1]
    return [placed(q, start + cached) * factor, placed(k, start), v, *others, *kept]


def flat(given: Any) -> list[Tensor]:
    return [given.q, given.k, given.v, *given.others, *given.kept]


def problem(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves and options."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, kind).requires_grad_()

    leaves = [leaf(case.batch, case.length, case.parts, case.heads, case.width)]
    if case.scaled:
        leaves.append(leaf(case.heads, kind=torch.promote_types(dtype, torch.float32)))
    if case.cached:
        leaves += [leaf(case.batch, case.cached, case.heads, case.width) for _ in range(2)]
    return leaves, {"base": case.base, "start": case.start, "keep": case.keep}


def call(form: Callable[..., Any], case: Case, leaves: list[Tensor], **options: Any) -> Any:
    qkv, *rest = leaves
    scale = rest[0] if case.scaled else None
    cache = (rest[-2], rest[-1]) if case.cached else None
    return form(qkv, cache, scale=scale, **options)


def check_against_the_definition(
    form: Callable[..., Any], case: Case, dtype: torch.dtype, device: str
) -> None:
    leaves, options = problem(case, dtype, device)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    got = flat(call(form, case, leaves, **options))
    want = call(definition, case, wide, **options)
    assert all(a.dtype == dtype and a.shape == b.shape for a, b in zip(got, want, strict=True))
    generator = torch.Generator().manual_seed(1)
    above = [torch.randn(b.shape, generator=generator).to(device, dtype) for b in want]
    # Attention may write gradients heads first.
    above[0] = above[0].transpose(1, 2).contiguous().transpose(1, 2)
    got += torch.autograd.grad(got, leaves, above, allow_unused=True)
    want += torch.autograd.grad(want, wide, [d.double() for d in above], allow_unused=True)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype or a.shape == (case.heads,)
        assert (a.double() - b).norm() <= BOUNDS[dtype] * b.norm(), (a, b)


@every_dtype
@every_case
def test_values_and_gradients_equal_the_definition(name: str, dtype: torch.dtype) -> None:
    check_against_the_definition(prepare_qkv, CASES[name], dtype, "cpu")


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("name", GPU_CASES)
def test_the_kernels_equal_the_definition(name: str, dtype: torch.dtype) -> None:
    check_against_the_definition(prepare_qkv, GPU_CASES[name], dtype, "cuda")


@pytest.mark.triton
@every_dtype
@every_case
def test_interpreted_kernels_equal_the_definition(name: str, dtype: torch.dtype) -> None:
    check_against_the_definition(fused_prepare_qkv, CASES[name], dtype, "cpu")


@pytest.mark.triton
@pytest.mark.parametrize("used", [[0], [1], [2, 3], [0, 1, 2, 3]], ids=str)
def test_what_nobody_uses_adds_nothing_to_the_gradient(used: list[int]) -> None:
    """The keys and values of a state above all."""
    case = CASES["four parts"]
    leaves, options = problem(case, torch.float64, "cpu")
    found = []
    for form in (lambda *x, **o: flat(fused_prepare_qkv(*x, **o)), definition):
        outputs = [call(form, case, leaves, **options)[i] for i in used]
        loss = sum((y * (1 + torch.arange(y.numel()).view(y.shape))).sum() for y in outputs)
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*found)


def check_compiled(name: str, backend: str, device: str) -> None:
    """In one graph, and to the same numbers."""

    def form(*args: Any, **options: Any) -> list[Tensor]:
        return flat(fused_prepare_qkv(*args, **options))

    case = CASES[name]
    leaves, options = problem(case, torch.float32, device)
    compiled = torch.compile(form, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for one in (form, compiled):
        found = call(one, case, leaves, **options)
        generator = torch.Generator().manual_seed(1)
        above = [torch.randn(a.shape, generator=generator).to(device) for a in found]
        results.append([*found, *torch.autograd.grad(found, leaves, above)])
    for eager, got in zip(*results, strict=True):
        torch.testing.assert_close(got, eager)


COMPILED = ["norms and positions", "positions", "four parts", "a cache"]


@pytest.mark.triton
@pytest.mark.parametrize("name", COMPILED)
def test_traced_it_computes_the_same(name: str) -> None:
    torch._dynamo.reset()
    check_compiled(name, "aot_eager", "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_computes_the_same(name: str) -> None:
    torch._dynamo.reset()
    check_compiled(name, "inductor", "cuda")


@pytest.mark.triton
@pytest.mark.parametrize("name", [name for name in COMPILED if CASES[name].keep])
def test_no_other_kernel_touches_the_gradient_of_the_projection(name: str) -> None:
    """Not even for what a state keeps, of which a compiled block that returns it has gradients."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    case = CASES[name]
    leaves, options = problem(case, torch.float32, "cpu")
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=keep)
    compiled = torch.compile(fused_prepare_qkv, fullgraph=True, dynamic=False, backend=backend)
    found = flat(call(compiled, case, leaves, **options))
    torch.autograd.grad(found, leaves, [torch.ones_like(a) for a in found])
    (outputs,) = next(node for node in graphs[0].graph.nodes if node.op == "output").args
    source, index = outputs[0].args
    assert source.target == torch.ops.longspan.prepare_parts_backward.default
    assert index == 0


def check_the_rules_of_torch_library(device: str) -> None:
    x = torch.randn(2, 5, 4, 3, 8, device=device)
    scale, cos, sin = (torch.randn(shape, device=device) for shape in (3, (5, 1, 4), (5, 1, 4)))
    above = [torch.randn(2, 5, 3, 8, device=device) for _ in range(4)]
    tests = ("test_schema", "test_faketensor")
    for angles in ((cos, sin), (None, None)):
        for factor in (scale, None):
            torch.library.opcheck(prepare_parts, (x, factor, *angles), test_utils=tests)
            given = (above, x[:, 3:, 1:3], x, factor, *angles)
            torch.library.opcheck(prepare_parts_backward, given, test_utils=tests)


@pytest.mark.triton
def test_interpreted_operators_keep_the_rules_of_torch_library() -> None:
    check_the_rules_of_torch_library("cpu")


@pytest.mark.gpu
def test_the_operators_keep_the_rules_of_torch_library() -> None:
    check_the_rules_of_torch_library("cuda")
