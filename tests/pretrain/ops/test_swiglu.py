"""The gate of a SwiGLU and, on a GPU, its hand-written derivative equal the definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.swiglu import fused_swiglu, swiglu

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
WIDTHS = [1, 7, 1024, 2752]  # odd ones, one block, the last block not full

every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def leaf(width: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(3, 5, 2 * width, generator=generator)
    x[0, 0, 0] = 1e4
    x[1, 1, 0] = -1e4  # exp(1e4) is infinite
    return x.to(device, dtype).requires_grad_()


def check_against_the_definition(width: int, dtype: torch.dtype, device: str) -> None:
    x = leaf(width, dtype, device)
    wide = x.detach().double().requires_grad_()
    want = F.silu(wide[..., :width]) * wide[..., width:]
    got = swiglu(x)
    assert got.dtype == dtype
    weights = torch.randn(want.shape, dtype=torch.float64).to(device)
    pairs = [(got, want)]
    for factor in (weights, weights.sum(0).expand_as(want)):  # of the second, memory overlaps
        d_got, d_want = factor.to(dtype), factor.to(dtype).double()
        pairs.append(
            (
                torch.autograd.grad(got, x, d_got, retain_graph=True)[0],
                torch.autograd.grad(want, wide, d_want, retain_graph=True)[0],
            )
        )
    for a, b in pairs:
        assert a.isfinite().all()
        # Each by itself: the few large entries would hide the others. 0.1: silu' has a zero.
        assert ((a.double() - b).abs() <= BOUNDS[dtype] * (b.abs() + 0.1)).all()


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
    x = leaf(7, torch.float32, "cuda").detach()
    torch.library.opcheck(fused_swiglu, ((x.transpose(0, 1) if turned else x).requires_grad_(),))


@pytest.mark.gpu
def test_compiled_it_stays_one_operator_and_as_right() -> None:
    x = leaf(64, torch.float32, "cuda")
    compiled = torch.compile(swiglu, fullgraph=True, dynamic=False)
    d = torch.randn(3, 5, 64, device="cuda")
    for a, b in zip(
        (compiled(x), *torch.autograd.grad(compiled(x), x, d)),
        (swiglu(x), *torch.autograd.grad(swiglu(x), x, d)),
        strict=True,
    ):
        assert torch.equal(a, b)
