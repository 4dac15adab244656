"""FlexAttention's tiles hold exactly the visible pairs, and its result is the definition's."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.attention.flex_attention import flex_attention

from pretrain.ops import flex_window_attention as module
from pretrain.ops.flex_window_attention import TILE, flex_window_attention, visited_tiles
from pretrain.ops.window_attention import cached_keys, window_attention_naive

REACHES = ("window", "own", "own_and_previous")
# fp32: order of summation. bf16: 8 bits, and weights rounded before they meet the values.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def dense(reach: str, block_size: int, offset: int, length: int, cached: int) -> Tensor:
    """The definition of who is visible, (T, M + T)."""
    query = offset + torch.arange(length)[:, None]
    key = torch.arange(cached + length)[None] - cached + offset
    if reach == "window":
        return (key <= query) & (query - key < block_size)
    blocks = query // block_size - key.div(block_size, rounding_mode="floor")
    return (key <= query) & (blocks <= (reach == "own_and_previous"))


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("block_size", [64, 96, 128, 512])
def test_tiles_are_those_with_a_visible_pair(reach: str, block_size: int) -> None:
    device = torch.device("cpu")
    for length, offset, carried in itertools.product((1, 128, 300, 1024), (0, 17), (False, True)):
        if offset and not carried:
            continue
        cached = cached_keys(reach, block_size, offset) if carried else 0
        seen = dense(reach, block_size, offset, length, cached)
        n_rows, n_columns = -(-length // TILE), -(-(cached + length) // TILE)
        # Tiles that reach beyond the last query are full without it, beyond the last key never.
        ends = (0, n_columns * TILE - cached - length, 0, n_rows * TILE - length)
        tiled = F.pad(seen, ends).view(n_rows, TILE, n_columns, TILE)
        some = tiled.any(3).any(1)
        beyond = torch.arange(n_rows * TILE).view(n_rows, TILE, 1) >= length
        every = (tiled.all(3) | beyond).all(1) & some
        for whole in (True, False):
            rows, columns = visited_tiles(
                length, cached, block_size, reach, offset, whole=whole, device=device
            )
            full = every if whole else torch.zeros_like(every)
            for tiles, want_some, want_full in ((rows, some, full), (columns, some.T, full.T)):
                counts = torch.zeros(2, *want_some.shape, dtype=torch.int64)
                listed = (tiles.partial_count, tiles.partial), (tiles.full_count, tiles.full)
                for kind, (sizes, indices) in enumerate(listed):
                    for row, size in enumerate(sizes.tolist()):
                        assert size <= indices.shape[1]
                        counts[kind, row] += torch.bincount(
                            indices[row, :size], minlength=want_some.shape[1]
                        )
                assert torch.equal(counts[0], (want_some & ~want_full).long())
                assert torch.equal(counts[1], want_full.long())


def problem(
    reach: str, offset: int, carried: bool, device: str, dtype: torch.dtype, width: int = 32
):
    torch.manual_seed(0)
    block_size, length = 64, 2 * TILE + 19
    cached = cached_keys(reach, block_size, offset) if carried else 0
    shapes = [(2, n, 2, width) for n in (length, cached + length, cached + length)]
    leaves = [torch.randn(shape).to(dtype).float() for shape in shapes]
    leaves.append(torch.randn(2, 4 * block_size))
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    blocks = -(-(offset + length) // block_size)
    fresh = torch.rand(2, blocks, device=device) < 0.3
    options = {"block_size": block_size, "reach": reach, "offset": offset}
    return leaves, fresh, options


def compare(
    fast: Callable[..., Tensor],
    leaves,
    fresh,
    options,
    dtype: torch.dtype,
    *,
    biased: bool,
    flags: bool,
) -> None:
    results = []
    for form, kind in ((fast, dtype), (window_attention_naive, torch.float64)):
        q, k, v = (leaf.to(kind) for leaf in leaves[:3])
        wide = torch.promote_types(kind, torch.float32)
        y = form(
            q,
            k,
            v,
            fresh=fresh if flags else None,
            bias=leaves[3].to(wide) if biased else None,
            **options,
        )
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
        inputs = leaves if biased else leaves[:3]
        results.append([y])
        if y.requires_grad:
            results[-1] += torch.autograd.grad((y.double() * weights).sum(), inputs)
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() < BOUNDS[dtype] * want.norm()


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize(("offset", "carried"), [(0, False), (0, True), (17, True)])
def test_masks_and_biases_are_the_definitions(
    reach: str, offset: int, carried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncompiled: FlexAttention then forms all scores and applies the same functions to them."""
    monkeypatch.setattr(module, "_compiled_flex_attention", flex_attention)
    leaves, fresh, options = problem(reach, offset, carried, "cpu", torch.float32)
    leaves = [leaf.detach() for leaf in leaves]  # a CPU has no backward of it
    compare(flex_window_attention, leaves, fresh, options, torch.float32, biased=False, flags=False)
    compare(flex_window_attention, leaves, fresh, options, torch.float32, biased=True, flags=True)


def test_no_call_falls_back_to_forming_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo compiles a function for so many kinds of calls and runs the others uncompiled, at a
    cost of T^2. Lengths that take the same number of tiles share a kernel."""
    torch._dynamo.reset()
    made, run = [], []

    def count(graph: torch.fx.GraphModule, examples: object) -> Callable[..., object]:
        made.append(graph)

        def forward(*arguments: Tensor) -> object:
            run.append(graph)
            return graph(*arguments)

        return forward

    compiled = torch.compile(flex_attention, dynamic=False, backend=count)
    monkeypatch.setattr(module, "_compiled_flex_attention", compiled)
    calls = [(length, cached) for length in (128, 200, 256, 300, 512, 640) for cached in (0, 64)]
    with torch.no_grad():
        for length, cached in calls:
            q, k = torch.randn(1, length, 1, 16), torch.randn(1, cached + length, 1, 16)
            y = flex_window_attention(q, k, k, block_size=64, reach="window")
            assert y.shape == q.shape
    assert len(run) == len(calls)
    assert len(made) == len({(-(-length // TILE), cached) for length, cached in calls})


def test_a_mask_in_a_compiled_graph_reads_numbers_from_memory() -> None:
    """Nothing is worked out in the mask."""
    nodes: list[torch.fx.Node] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        nodes.extend(graph.graph.nodes)
        return make_boxed_func(graph)

    def form(q: Tensor, fresh: Tensor) -> Tensor:
        return flex_window_attention(q, q, q, block_size=64, reach="window", fresh=fresh)

    torch._dynamo.reset()
    q = torch.randn(2, 2 * TILE, 1, 16, dtype=torch.bfloat16)
    fresh = torch.tensor([[True, False, True, False], [True, False, False, False]])
    backend = aot_autograd(fw_compiler=keep)
    with torch.no_grad():
        torch.compile(form, fullgraph=True, dynamic=False, backend=backend)(q, fresh)
    (node,) = (node for node in nodes if node.target is torch.ops.higher_order.flex_attention)
    captured = node.args[-1]
    assert [x.target for x in captured] == [torch.ops.longspan.document_numbers.default]


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
def test_compiled_together_with_its_mask_it_is_the_definition(flags: bool, gradients: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flex_window_attention, dynamic=False)
    leaves, fresh, options = problem("own_and_previous", 17, True, "cuda", torch.bfloat16)
    if not gradients:
        leaves = [leaf.detach() for leaf in leaves]
    compare(compiled, leaves, fresh, options, torch.bfloat16, biased=False, flags=flags)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("reach", REACHES)
def test_the_kernel_equals_the_definition(
    reach: str, flags: bool, biased: bool, dtype: torch.dtype
) -> None:
    torch._dynamo.reset()
    for offset, carried in ((0, False), (17, True)):
        leaves, fresh, options = problem(reach, offset, carried, "cuda", dtype)
        compare(flex_window_attention, leaves, fresh, options, dtype, biased=biased, flags=flags)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("width", [64, 96, 128, 192, 256])
def test_heads_of_every_width_fit_into_shared_memory(width: int, biased: bool) -> None:
    torch._dynamo.reset()
    leaves, fresh, options = problem("window", 17, True, "cuda", torch.bfloat16, width)
    compare(
        flex_window_attention, leaves, fresh, options, torch.bfloat16, biased=biased, flags=True
    )
