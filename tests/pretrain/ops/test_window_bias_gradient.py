"""A bias by distance gets its gradient beside FlexAttention, and no other gradient changes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pretrain.ops import flex_symmetric_window, flex_window_attention, window_bias_gradient
from pretrain.ops.flex_symmetric_window import flex_symmetric_window_attention
from pretrain.ops.symmetric_window_attention import symmetric_window_attention_naive
from pretrain.ops.window_attention import cached_keys, window_attention, window_attention_naive
from pretrain.ops.window_bias_gradient import Pairs, sums_by_distance, window_bias_gradient_naive
from tests.pretrain.ops.dense_flex import dense_flex_attention

HEADS = 2
# fp32: order of summation. The others: their bits, and weights rounded before they meet the values.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
REACHES = ("window", "own", "own_and_previous")
Problem = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], dict]

every_reach = pytest.mark.parametrize("reach", REACHES)
every_cache = pytest.mark.parametrize(
    ("offset", "carried"), [(0, False), (0, True), (17, True)], ids=["no cache", "cache", "inside"]
)
on_gpu = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# The interpreter multiplies no matrices in bf16.
interpreted = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
flagged = pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
padded = pytest.mark.parametrize("pads", [False, True], ids=["no padding", "padding"])


def randn(*shape: int, device: str) -> Tensor:
    """Never the same twice: queries that equal keys would see little but themselves."""
    return torch.randn(shape).to(device)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def causal(
    reach: str, offset: int, carried: bool, flags: bool, device: str, width: int = 24
) -> Problem:
    """The op that is tested, the definition, their leaves q, k, v and bias, and options."""
    size, length = 40, 150
    cached = cached_keys(reach, size, offset) if carried else 0
    leaves = [randn(2, n, HEADS, width, device=device) for n in (length, *[cached + length] * 2)]
    leaves.append(randn(HEADS, 2 * size + 3, device=device))  # no key is as far as the last
    fresh = torch.rand(2, -(-(offset + length) // size), device=device) < 0.3
    options = {"block_size": size, "reach": reach, "offset": offset}
    options["fresh"] = fresh if flags else None
    form = window_attention if device == "cuda" else flex_window_attention.flex_window_attention
    return form, window_attention_naive, leaves, options


def symmetric(pads: bool, device: str, width: int = 24) -> Problem:
    """Likewise."""
    size, length = 40, 150
    leaves = [randn(2, length, HEADS, width, device=device) for _ in range(3)]
    leaves.append(randn(HEADS, 2 * size - 1, device=device))
    padding = torch.arange(length, device=device) >= torch.tensor([[length], [97]], device=device)
    options = {"window_size": size, "padding": padding if pads else None}
    return flex_symmetric_window_attention, symmetric_window_attention_naive, leaves, options


def check(problem: Problem, dtype: torch.dtype) -> None:
    form, definition, leaves, options = problem
    d_y = randn(*leaves[0].shape, device=leaves[0].device.type)
    *leaves, d_y = (leaf.to(dtype).double() for leaf in (*leaves, d_y))
    results = []
    for function, kind in ((form, dtype), (definition, torch.float64)):
        kinds = [*[kind] * 3, torch.promote_types(kind, torch.float32)]  # a bias is in fp32
        inputs = [leaf.to(k).requires_grad_() for leaf, k in zip(leaves, kinds, strict=True)]
        y = function(*inputs[:3], bias=inputs[3], **options)
        results.append([y, *torch.autograd.grad(y, inputs, d_y.to(kind))])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert (got.double() - want).norm() < BOUNDS[dtype] * want.norm()


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention written out, so that all but the kernel runs on a CPU."""
    monkeypatch.setattr(flex_window_attention, "_compiled_flex_attention", dense_flex_attention)
    for module in (flex_window_attention, flex_symmetric_window):  # in compiled code
        monkeypatch.setattr(module, "flex_attention", dense_flex_attention)


@pytest.fixture
def definition(dense: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the kernel, too."""
    monkeypatch.setattr(window_bias_gradient, "window_bias_gradient", window_bias_gradient_naive)


@flagged
@every_cache
@every_reach
def test_all_gradients_are_the_definitions(
    reach: str, offset: int, carried: bool, flags: bool, definition: None
) -> None:
    check(causal(reach, offset, carried, flags, "cpu"), torch.float32)


@padded
def test_all_gradients_are_the_definitions_on_both_sides(pads: bool, definition: None) -> None:
    check(symmetric(pads, "cpu"), torch.float32)


def test_a_compiler_takes_it_whole(definition: None) -> None:
    for form, *rest in (causal("window", 17, True, True, "cpu"), symmetric(True, "cpu")):
        torch._dynamo.reset()
        whole = torch.compile(form, backend="aot_eager", fullgraph=True, dynamic=False)
        check((whole, *rest), torch.float32)


def test_without_gradients_nothing_is_kept(dense: None) -> None:
    form, naive, leaves, options = causal("window", 0, True, True, "cpu")
    want = naive(*leaves[:3], bias=leaves[3], **options)
    leaves[3].requires_grad_()
    with torch.no_grad():
        got = form(*leaves[:3], bias=leaves[3], **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    constant = form(leaves[0].requires_grad_(), *leaves[1:3], bias=leaves[3].detach(), **options)
    assert "WithBiasGradient" not in str(constant.grad_fn.next_functions)


@pytest.mark.parametrize(("lowest", "distances"), [(0, 9), (0, 20), (-5, 11), (-7, 15), (0, 1)])
def test_tiles_are_summed_by_distance(lowest: int, distances: int) -> None:
    size = 4
    first, last = lowest // size, (lowest + distances - 2) // size + 1
    first_query = size * torch.arange(first, last + 1).view(-1, 1, 1)
    back = first_query + torch.arange(size).unsqueeze(1) - torch.arange(size)
    sums = torch.randn(HEADS, *back.shape, dtype=torch.float64)
    got = sums_by_distance(sums, first, lowest, distances)
    want = [sums[:, back == lowest + place].sum(1) for place in range(distances)]
    torch.testing.assert_close(got, torch.stack(want, 1), rtol=0, atol=1e-12)


@pytest.mark.triton
@interpreted
@flagged
@every_cache
@every_reach
def test_the_interpreted_kernel_gives_them(
    reach: str, offset: int, carried: bool, flags: bool, dtype: torch.dtype, dense: None
) -> None:
    check(causal(reach, offset, carried, flags, "cpu"), dtype)


@pytest.mark.triton
@interpreted
@padded
def test_the_interpreted_kernel_gives_them_on_both_sides(
    pads: bool, dtype: torch.dtype, dense: None
) -> None:
    check(symmetric(pads, "cpu"), dtype)


@pytest.mark.triton
@every_reach
def test_the_operator_keeps_the_rules_of_torch_library(reach: str) -> None:
    q, k, d_y = (randn(2, n, HEADS, 16, device="cpu") for n in (70, 80, 70))
    marks = torch.zeros(2, 80, dtype=torch.int32)
    delta, lse = (randn(*shape, device="cpu") for shape in ((2, 70, HEADS), (2, HEADS, 70)))
    bias = randn(HEADS, 33, device="cpu")
    given = (d_y, delta, bias, q, k, k, lse, marks, *Pairs(reach, 16, 10, 3), 0.5)
    torch.library.opcheck(window_bias_gradient.window_bias_gradient, given)


@pytest.mark.gpu
@on_gpu
@flagged
@every_cache
@every_reach
def test_on_a_gpu_all_gradients_are_the_definitions(
    reach: str, offset: int, carried: bool, flags: bool, dtype: torch.dtype
) -> None:
    torch._dynamo.reset()
    check(causal(reach, offset, carried, flags, "cuda"), dtype)


@pytest.mark.gpu
@on_gpu
@padded
@pytest.mark.parametrize("width", [24, 64, 128, 256])
def test_on_a_gpu_compiled_they_are(width: int, pads: bool, dtype: torch.dtype) -> None:
    """Of every width of heads the kernel fits into shared memory; fp32 has small tiles."""
    for form, *rest in (
        symmetric(pads, "cuda", width),
        causal("window", 17, True, pads, "cuda", width),
    ):
        torch._dynamo.reset()
        check((torch.compile(form, fullgraph=True, dynamic=False), *rest), dtype)
