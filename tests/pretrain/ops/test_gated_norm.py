"""A gated norm's product and, on a GPU, its hand-written derivatives equal the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.gated_norm import (
    GatedNorm,
    _fused_gated_norm_linear_backward,
    fused_gated_norm_linear,
    gated_norm_linear,
)

# fp64 and fp32: order of summation, exp. bf16: what is read, written and multiplied is rounded, by
# Triton's interpreter towards zero.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
EPS, D = 1e-5, 5

every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
every_size = pytest.mark.parametrize(("width", "groups"), [(12, 1), (12, 3), (1, 1), (160, 2)])


def leaves(width: int, dtype: torch.dtype, device: str, tokens: int = 17) -> list[Tensor]:
    """y, z, gain and the weight; 2 * tokens are no multiple of a program's tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    wide = torch.promote_types(dtype, torch.float32)
    y, z = draw(2, tokens, width), 2 * draw(2, tokens, width)
    y[0, 1] = 0  # eps alone keeps the norm finite
    z[0, 2, 0] = -1e4  # exp(1e4) is infinite
    parts = [(y, dtype), (z, dtype), (draw(width), wide), (draw(D, width), dtype)]
    return [x.to(device, kind).requires_grad_() for x, kind in parts]


def definition(y: Tensor, z: Tensor, gain: Tensor, weight: Tensor, groups: int) -> Tensor:
    parts = (y * F.silu(z)).unflatten(-1, (groups, -1))
    return F.linear(F.rms_norm(parts, parts.shape[-1:], eps=EPS).flatten(-2) * gain, weight)


def check(width: int, groups: int, dtype: torch.dtype, device: str, *, fused: bool) -> None:
    inputs = leaves(width, dtype, device)
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs]
    y, z, gain, weight = inputs
    if fused:
        got = fused_gated_norm_linear(y, z, gain, weight, groups, EPS)
    else:
        got = gated_norm_linear(GatedNorm(y, z, gain, groups, EPS), weight)
    want = definition(*wide, groups)
    assert got.dtype == dtype
    factor = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(device)
    pairs = [(got, want)]
    for d in (factor, factor.sum(0).expand_as(want)):  # of the second, memory overlaps
        d = d.to(dtype)
        a = torch.autograd.grad(got, inputs, d, retain_graph=True)
        b = torch.autograd.grad(want, wide, d.double(), retain_graph=True)
        pairs += zip(a, b, strict=True)
    for a, b in pairs:
        assert (a.double() - b).norm() <= BOUNDS[dtype] * b.norm(), (a, b)


@every_dtype
@every_size
def test_values_and_gradients_equal_the_definition(
    width: int, groups: int, dtype: torch.dtype
) -> None:
    check(width, groups, dtype, "cpu", fused=False)


@pytest.mark.triton
def test_interpreted_kernels_need_no_eps_behind_the_last_token() -> None:
    y, z, gain, weight = leaves(12, torch.float32, "cpu")
    y = y.detach().clone()
    y[0, 1] = 1
    inputs = [y.requires_grad_(), z, gain, weight]
    runs = (
        fused_gated_norm_linear,
        lambda y, z, gain, weight, groups, eps: gated_norm_linear(
            GatedNorm(y, z, gain, groups, eps), weight
        ),
    )
    found, want = (torch.autograd.grad(run(*inputs, 1, 0.0).sum(), inputs) for run in runs)
    torch.testing.assert_close(found, want)


@pytest.mark.triton
@every_dtype
@every_size
def test_interpreted_kernels_equal_the_definition(
    width: int, groups: int, dtype: torch.dtype
) -> None:
    check(width, groups, dtype, "cpu", fused=True)


@pytest.mark.triton
def test_traced_it_computes_the_same() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        fused_gated_norm_linear, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    inputs = leaves(12, torch.bfloat16, "cpu")  # and the gain in fp32
    d = torch.randn(2, 17, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for form in (compiled, fused_gated_norm_linear):
        out = form(*inputs, 3, EPS)
        results.append([out, *torch.autograd.grad(out, inputs, d)])
    for got, eager in zip(*results, strict=True):
        assert got.dtype == eager.dtype
        assert torch.equal(got, eager)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(("width", "groups"), [(12, 3), (160, 2), (2048, 1), (4096, 1)])
def test_the_kernels_equal_the_definition(width: int, groups: int, dtype: torch.dtype) -> None:
    check(width, groups, dtype, "cuda", fused=False)


def check_the_rules_of_torch_library(device: str) -> None:
    inputs = leaves(12, torch.bfloat16, device, tokens=3)  # the gain has another dtype
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(fused_gated_norm_linear, (*inputs, 3, EPS), test_utils=tests)
    d = torch.randn(2, 3, D).to(inputs[0])
    given = (d, *(leaf.detach() for leaf in inputs), 3, EPS)
    torch.library.opcheck(_fused_gated_norm_linear_backward, given, test_utils=tests[:2])


@pytest.mark.triton
def test_interpreted_operator_keeps_the_rules_of_torch_library() -> None:
    check_the_rules_of_torch_library("cpu")


@pytest.mark.gpu
def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    check_the_rules_of_torch_library("cuda")
