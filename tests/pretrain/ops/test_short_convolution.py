"""The short convolution against torch's, one document at a time."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.short_convolution import (
    fused_short_convolution,
    short_convolution,
    short_convolution_naive,
)

CHANNELS, TAPS, LENGTH = 3, 4, 19


@pytest.mark.parametrize("sizes", [[LENGTH], [1] * LENGTH, [2, 9, 8]], ids=str)
@pytest.mark.parametrize("grid", [1, 2, 5])
def test_documents_and_splits_equal_separate_convolutions(sizes: list[int], grid: int) -> None:
    generator = torch.Generator().manual_seed(grid)
    x = torch.randn(1, LENGTH, CHANNELS, generator=generator, dtype=torch.float64)
    weight = torch.randn(CHANNELS, TAPS, generator=generator, dtype=torch.float64)
    bias = torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
    begins = torch.rand(LENGTH, generator=generator) < 0.4
    begins[torch.arange(LENGTH) % grid > 0] = False

    outputs, state, start = [], None, 0
    for size in sizes:
        edges = range(-start % grid, max(size, -start % grid), grid)
        resets = begins[start : start + size][list(edges)].unsqueeze(0)
        y, state = short_convolution(
            x[:, start : start + size],
            weight,
            bias,
            state,
            resets=resets if edges else None,
            edges=edges,
        )
        outputs.append(y)
        start += size

    starts = [0, *(t for t in range(1, LENGTH) if begins[t]), LENGTH]
    want = [
        F.silu(
            F.conv1d(
                F.pad(x[:, a:b].transpose(1, 2), (TAPS - 1, 0)),
                weight.unsqueeze(1),
                bias,
                groups=CHANNELS,
            )
        ).transpose(1, 2)
        for a, b in pairwise(starts)
    ]
    torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(want, 1), rtol=0, atol=1e-13)
    last = F.pad(x[:, starts[-2] :], (0, 0, TAPS - 1, 0))[:, 1 - TAPS :]
    assert state is not None
    assert torch.equal(state, last)


# bf16: the inputs are as they are, results and their gradients are rounded once.
every_dtype = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
every_size = pytest.mark.parametrize(
    ("batch", "length", "channels", "taps"),
    [(2, 300, 5, 4), (1, 253, 2, 4), (1, 1, 3, 4), (2, 17, 300, 4), (1, 40, 3, 1), (1, 2, 3, 6)],
)
every_document = pytest.mark.parametrize(
    "documents", [False, True], ids=["one document", "documents"]
)


def problem(
    batch: int, length: int, channels: int, taps: int, documents: bool, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor | None]:
    """x between others, front, weight, bias; starts."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    x = draw(batch, length, channels + 3).to(dtype)[:, :, 1 : channels + 1]
    leaves = [x, draw(batch, taps - 1, channels).to(dtype)]
    leaves += [draw(channels, taps).to(wide), draw(channels).to(wide)]
    if not documents:
        return leaves, None
    begins = torch.rand(batch, length, generator=generator) < 0.3
    starts = torch.where(begins, torch.arange(length), -(2**40)).cummax(1).values
    # Rows lie apart, as inductor likes them.
    return leaves, F.pad(starts, (0, 5), value=2**40)[:, :length]


def check_against_the_definition(
    leaves: list[Tensor], starts: Tensor | None, bound: float, device: str
) -> None:
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    want = short_convolution_naive(*wide, starts)
    d = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d = d.to(leaves[0].dtype)
    own = [leaf.to(device).requires_grad_() for leaf in leaves]
    got = fused_short_convolution(*own, None if starts is None else starts.to(device))
    found = got, *torch.autograd.grad(got, own, d.to(device))
    right = want, *torch.autograd.grad(want, wide, d.double())
    for a, b in zip(found, right, strict=True):
        assert a.shape == b.shape
        assert (a.double().cpu() - b).norm() <= bound * b.norm()


@pytest.mark.triton
@every_document
@every_size
@every_dtype
def test_the_interpreted_kernels_equal_the_definition(
    dtype: torch.dtype,
    bound: float,
    batch: int,
    length: int,
    channels: int,
    taps: int,
    documents: bool,
) -> None:
    given = problem(batch, length, channels, taps, documents, dtype)
    check_against_the_definition(*given, bound, "cpu")


@pytest.mark.gpu
@every_document
@every_size
@every_dtype
def test_the_kernels_equal_the_definition(
    dtype: torch.dtype,
    bound: float,
    batch: int,
    length: int,
    channels: int,
    taps: int,
    documents: bool,
) -> None:
    given = problem(batch, length, channels, taps, documents, dtype)
    check_against_the_definition(*given, bound, "cuda")


@pytest.mark.triton
def test_the_interpreted_operator_keeps_the_rules_of_torch_library() -> None:
    leaves, starts = problem(1, 5, 3, 4, True, torch.float32)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    torch.library.opcheck(fused_short_convolution, (*leaves, starts))


@pytest.mark.gpu
def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    leaves, starts = problem(2, 33, 9, 4, True, torch.bfloat16)
    own = [leaf.cuda().requires_grad_() for leaf in leaves]
    torch.library.opcheck(
        fused_short_convolution, (*own, None if starts is None else starts.cuda())
    )
