"""Symmetric windows by FlexAttention: the mask, the bias and the tiles; on a GPU the kernel."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from pretrain.ops.flex_symmetric_window import (
    TILE,
    flex_symmetric_window_attention,
    visited_tiles,
)
from pretrain.ops.symmetric_window_attention import symmetric_window_attention_naive

BATCH, HEADS, WIDTH = 2, 2, 16

# fp32: order of summation, on a GPU in TF32 at worst. bf16: scores and weights have 8 bits.
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 2e-2}


def problem(length: int, w: int, device: str, width: int = WIDTH) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, length, HEADS, width)] * 3 + [(HEADS, 2 * w - 1)]
    leaves = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    padding = torch.arange(length) >= torch.tensor([[length], [length // 2]])
    return leaves, padding.to(device)


@pytest.mark.parametrize("w", [1, 32, 200])
@pytest.mark.parametrize("length", [TILE, 2 * TILE + 19])
def test_mask_and_bias_are_the_definitions(length: int, w: int) -> None:
    """Not by inductor: FlexAttention then forms all scores and applies the same functions."""
    (q, k, v, bias), padding = problem(length, w, "cpu")
    for options in ({}, {"padding": padding, "bias": bias, "scale": 0.5}):
        got = flex_symmetric_window_attention(q, k, v, window_size=w, **options)
        want = symmetric_window_attention_naive(q, k, v, window_size=w, **options)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_compiler_takes_it_whole() -> None:
    (q, k, v, bias), padding = problem(TILE + 19, 32, "cpu")
    whole = torch.compile(flex_symmetric_window_attention, backend="aot_eager", fullgraph=True)
    options = {"window_size": 32, "padding": padding, "bias": bias}
    want = symmetric_window_attention_naive(q, k, v, **options)
    torch.testing.assert_close(whole(q, k, v, **options), want, rtol=1e-5, atol=1e-5)


def test_the_mask_reads_padding_as_it_came() -> None:
    """What is made of it in the graph would be made anew for every pair, or not at all."""
    (q, k, v, _), padding = problem(TILE + 19, 32, "cpu")
    nodes: list[torch.fx.Node] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nodes.extend(graph.graph.nodes)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=keep)
    whole = torch.compile(flex_symmetric_window_attention, backend=backend, fullgraph=True)
    with torch.no_grad():
        whole(q, k, v, window_size=32, padding=padding)
    (node,) = (node for node in nodes if node.target is torch.ops.higher_order.flex_attention)
    assert [source.op for source in node.args[-1]] == ["placeholder"]


@pytest.mark.parametrize("w", [1, 2, 32, TILE, TILE + 1, TILE + 2, 1000])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_visited_tiles_are_those_with_a_visible_pair(n: int, w: int) -> None:
    count, tiles = visited_tiles(n * TILE, w, torch.device("cpu"))
    place = torch.arange(n * TILE)
    visible = (place.unsqueeze(1) - place).abs() < w
    want = visible.view(n, TILE, n, TILE).any(3).any(1)
    for row in range(n):
        assert tiles[row, : count[row]].tolist() == want[row].nonzero().flatten().tolist()
    assert torch.equal(want, want.T)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("length", "w"), [(TILE, 32), (4 * TILE + 19, 32), (4 * TILE, 200)])
def test_kernel_equals_dense_masked_softmax(
    length: int, w: int, biased: bool, dtype: torch.dtype
) -> None:
    compare(length, w, WIDTH, biased=biased, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
def test_heads_of_every_width_fit_into_shared_memory(width: int, biased: bool) -> None:
    compare(2 * TILE + 19, 200, width, biased=biased, dtype=torch.bfloat16)


def compare(length: int, w: int, width: int, *, biased: bool, dtype: torch.dtype) -> None:
    leaves, padding = problem(length, w, "cuda", width)
    used = leaves[: 3 + biased]
    weights = torch.randn_like(leaves[0]).masked_fill(padding[:, :, None, None], 0)
    compiled = torch.compile(flex_symmetric_window_attention, dynamic=False)
    results = []
    for form, kind in ((compiled, dtype), (symmetric_window_attention_naive, torch.float64)):
        inputs = [leaf.to(dtype).to(kind).requires_grad_() for leaf in used[:3]]
        inputs += [leaf.to(torch.promote_types(kind, torch.float32)) for leaf in used[3:]]
        inputs = [leaf.detach().requires_grad_() for leaf in inputs]
        bias = inputs[3] if biased else None
        y = form(*inputs[:3], window_size=w, padding=padding, bias=bias)
        gradients = torch.autograd.grad((y.double() * weights).sum(), inputs)
        results.append([y.double() * (weights != 0), *gradients])
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() < BOUNDS[dtype] * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
def test_without_gradients_it_compiles_too(padded: bool) -> None:
    (q, k, v, _), padding = problem(TILE + 19, 32, "cuda")
    compiled = torch.compile(flex_symmetric_window_attention, dynamic=False)
    options = {"window_size": 32, "padding": padding if padded else None}
    want = symmetric_window_attention_naive(q.double(), k.double(), v.double(), **options)
    with torch.no_grad():
        got = compiled(q, k, v, **options)
    assert (got.double() - want).norm() < BOUNDS[torch.float32] * want.norm()
