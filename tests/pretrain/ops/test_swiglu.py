"""A SwiGLU's end and, on a GPU, its hand-written derivative equal the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.swiglu import fused_swiglu_linear, swiglu_linear

BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}
WIDTHS = [1, 7, 1024, 2752]  # odd ones, one block, the last block not full
D = 16

every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def leaves(width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(3, 5, 2 * width, generator=generator)
    x[1, 1, 0] = -1e4  # exp(1e4) is infinite
    weight = torch.randn(D, width, generator=generator)
    return [leaf.to(device, dtype).requires_grad_() for leaf in (x, weight)]


def check_against_the_definition(width: int, dtype: torch.dtype, device: str) -> None:
    x, weight = leaves(width, dtype, device)
    wide = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    want = F.linear(F.silu(wide[0][..., :width]) * wide[0][..., width:], wide[1])
    got = swiglu_linear(x, weight)
    assert got.dtype == dtype
    factor = torch.randn(want.shape, dtype=torch.float64).to(device)
    pairs = [(got, want)]
    for d in (factor, factor.sum(0).expand_as(want)):  # of the second, memory overlaps
        rounded = d.to(dtype)
        pairs += zip(
            torch.autograd.grad(got, (x, weight), rounded, retain_graph=True),
            torch.autograd.grad(want, wide, rounded.double(), retain_graph=True),
            strict=True,
        )
    for a, b in pairs:
        assert a.isfinite().all()
        # A row by itself: one with large entries would hide the others.
        error = (a.double() - b).norm(dim=-1)
        assert (error <= BOUNDS[dtype] * (b.norm(dim=-1) + 0.1)).all()


@every_dtype
def test_values_and_gradients_equal_the_definition(dtype: torch.dtype) -> None:
    check_against_the_definition(7, dtype, "cpu")


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
    compiled = torch.compile(swiglu_linear, fullgraph=True, dynamic=False)
    d = torch.randn(3, 5, D, device="cuda")
    for a, b in zip(
        (compiled(x, weight), *torch.autograd.grad(compiled(x, weight), (x, weight), d)),
        (swiglu_linear(x, weight), *torch.autograd.grad(swiglu_linear(x, weight), (x, weight), d)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_only_what_it_is_given_is_kept_for_the_backward() -> None:
    kept: list[tuple[int, ...]] = []
    x, weight = leaves(64, torch.bfloat16, "cuda")
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(tuple(t.shape)) or t, lambda t: t
    ):
        swiglu_linear(x, weight)
    assert kept == [tuple(x.shape), tuple(weight.shape)]
