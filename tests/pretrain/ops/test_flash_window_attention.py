"""The starts of sequences say what the definition's mask says, and the operator what it returns."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.ops import flash_window_attention as module
from pretrain.ops import window_attention as choosing
from pretrain.ops.flash_window_attention import (
    SUMMED_WIDTH,
    document_starts,
    flash_serves,
    flash_window,
    flash_window_attention,
    write_gradients,
)
from pretrain.ops.window_attention import window_attention, window_attention_naive
from tests.pretrain.ops.plain_flash import on_hopper, plain_convert, runs, visible

# fp32: order of summation. bf16: 8 bits, and weights rounded before they meet the values.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_sequences_hold_exactly_the_visible_pairs(data: st.DataObject) -> None:
    block_size, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, 4 * block_size))
    carried = data.draw(st.booleans())
    offset = data.draw(st.integers(0, block_size - 1)) if carried else 0
    cached = block_size if carried else 0
    blocks = 1 if data.draw(st.booleans()) else -(-(offset + length) // block_size)
    flags = st.lists(st.booleans(), min_size=blocks, max_size=blocks)
    fresh = torch.tensor(data.draw(st.lists(flags, min_size=batch, max_size=batch)))

    starts = document_starts(length, cached, block_size, offset, fresh)
    keys = cached + length
    assert [x.shape for x in starts] == [(batch * (1 + blocks) + 1,)] * 2
    assert [x.dtype for x in starts] == [torch.int32] * 2
    assert [(x[0].item(), x[-1].item()) for x in starts] == [(0, batch * length), (0, batch * keys)]
    seen = torch.zeros(batch * length, batch * keys, dtype=torch.bool)
    for q, k in zip(*map(runs, starts), strict=True):
        assert 0 <= q.stop - q.start <= k.stop - k.start
        seen[q, k] = visible(q.stop - q.start, k.stop - k.start, block_size)
    # One-hot values read the visible set of every query off the definition's output.
    zeros = torch.zeros(batch, length, 1, keys)
    values = torch.eye(keys).expand(batch, -1, -1).unsqueeze(2)
    options = {"block_size": block_size, "reach": "window", "offset": offset}
    want = window_attention_naive(zeros, values, values, fresh=fresh, **options)[:, :, 0] > 0
    assert torch.equal(seen, torch.block_diag(*want).bool())


def compare(
    form,
    carried: bool,
    flags: bool,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    reach: str = "window",
) -> None:
    """Of `sizes` (T, W, H, K), against the definition in fp64."""
    torch.manual_seed(0)
    length, block_size, heads, width = sizes
    offset = block_size // 4 if carried else 0
    cached = block_size if carried else 0
    # Values as a view of a projection, where there is no cache to join them to.
    shapes = [(2, length, heads, width), *2 * [(2, cached + length, 3, heads, width)]]
    q, *kv = (torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
    leaves = [q, *kv]
    blocks = -(-(offset + length) // block_size)
    fresh = torch.rand(2, blocks, device=device) < 0.4
    fresh[:, 0] = torch.tensor([True, False])  # of the cached keys, one row's belong to nobody
    options = {"block_size": block_size, "reach": reach, "offset": offset}
    weights = torch.randn(q.shape, device=device)
    for marks in (fresh, fresh[:, :1]) if flags else (None,):
        results = []
        for function, kind in ((form, dtype), (window_attention_naive, torch.float64)):
            q, k, v = (leaf.to(kind) for leaf in leaves)
            # Memory that is handed out again: what a kernel leaves unwritten then shows.
            spoiled = [torch.full_like(k[:, :, 0], torch.nan) for _ in range(16)]
            del spoiled
            y = function(q, k[:, :, 0], v[:, :, 2], fresh=marks, **options)
            results.append([y, *torch.autograd.grad((y.to(kind) * weights).sum(), leaves)])
        for got, want in zip(*results, strict=True):
            assert (got.double() - want.double()).norm() < BOUNDS[dtype] * want.double().norm()


@pytest.mark.usefixtures("plain_flash")
@pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("carried", [False, True], ids=["no cache", "cache"])
def test_the_operator_is_the_definition_where_flash_does_what_it_says(
    carried: bool, flags: bool, flash_calls: list[int]
) -> None:
    compare(flash_window_attention, carried, flags, (19, 4, 2, 8), torch.float32, "cpu")
    assert flash_calls


@pytest.mark.usefixtures("plain_flash")
@pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
def test_blocks_are_the_definition_where_flash_does_what_it_says(flags: bool) -> None:
    compare(flash_window_attention, False, flags, (20, 4, 2, 8), torch.float32, "cpu", "own")


@pytest.mark.usefixtures("plain_flash")
def test_the_sum_of_the_queries_gradients_is_handed_out_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not converted; the next call, and one behind a failure, convert as ever."""
    torch.manual_seed(0)
    q, k, v, d_y, d_q, d_k, d_v = torch.randn(7, 2, 70, 3, SUMMED_WIDTH)
    saved = d_y, q, k, v, *flash_window(q, k, v, None, None, 9, 0.5), None, None, 9, 0.5
    assert write_gradients(*saved, (d_q, d_k, d_v)) is None
    into = torch.full_like(q, torch.nan), torch.empty_like(k), torch.empty_like(v)
    total = write_gradients(*saved, into, summed=True)
    assert total is not None
    assert into[0].isnan().all()
    assert total.shape == (2, 3, 128 * 128)
    plain_convert(total, into[0], 0.5)
    torch.testing.assert_close(into, (d_q, d_k, d_v))

    interface = sys.modules["flash_attn.cute.interface"]
    monkeypatch.setattr(interface, "_flash_attn_bwd", lambda *a, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_gradients(*saved, into, summed=True)
    assert interface._bwd_postprocess_convert is plain_convert


@pytest.mark.usefixtures("plain_flash")
@pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
def test_the_operator_keeps_the_rules_of_torch_library(flags: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 1, 4, requires_grad=True) for n in (6, 9, 9))
    starts = (None, None)
    if flags:
        starts = document_starts(6, 3, 3, 1, torch.tensor([[True, False, True], [False] * 3]))
    torch.library.opcheck(flash_window, (q, k, v, *starts, 3, 0.5))


@pytest.mark.usefixtures("plain_flash")
def test_a_compiled_graph_holds_it_whole() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        flash_window_attention, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    compare(compiled, True, True, (19, 4, 2, 8), torch.float32, "cpu")


@pytest.fixture
def installed_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLASH_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("installed_on_hopper")
@pytest.mark.parametrize("width", [64, 128, 136, 100])
def test_it_serves_16_bits_and_heads_of_widths_it_has(width: int) -> None:
    """Widths come in 16 bytes."""
    wide, narrow = (torch.zeros(1, width, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert flash_serves(narrow) == (width in (64, 128))
    assert not flash_serves(wide)


@pytest.mark.usefixtures("installed_on_hopper")
@pytest.mark.parametrize(
    ("place", "name", "found"),
    [
        (module, "FLASH_INSTALLED", False),
        (torch.cuda, "get_device_capability", lambda device: (8, 0)),
        (torch.cuda, "get_device_capability", lambda device: (10, 0)),
        (torch, "are_deterministic_algorithms_enabled", lambda: True),
    ],
    ids=["not installed", "Ampere", "Blackwell", "order matters"],
)
def test_it_serves_nowhere_else(
    place: ModuleType, name: str, found: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = torch.zeros(1, 64, dtype=torch.bfloat16)
    assert flash_serves(narrow)
    monkeypatch.setattr(place, name, found)
    assert not flash_serves(narrow)


class OnGPU(Tensor):
    device = torch.device("cuda")


@pytest.mark.usefixtures("installed_on_hopper")
@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, "flash"),
        ({"offset": 3}, "flash"),
        ({"fresh": torch.zeros(1, 1, dtype=torch.bool)}, "flash"),
        ({"reach": "own"}, "flash"),
        ({"reach": "own", "length": 300}, "flex"),
        ({"reach": "own", "offset": 3}, "flex"),
        ({"reach": "own", "block_size": 64}, "flex"),
        ({"reach": "own_and_previous"}, "flex"),
        ({"bias": torch.zeros(1, 128)}, "flex"),
        ({"dtype": torch.float32}, "flex"),
        ({"length": choosing.TILE - 1}, "sdpa"),
    ],
    ids=str,
)
def test_which_kernels_windows_take_on_hopper(
    options: dict[str, Any], taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("flash_window_attention", "flex_window_attention", "window_attention_sdpa")
    found = []
    for name in names:
        monkeypatch.setattr(choosing, name, lambda *a, name=name, **more: found.append(name))
    options = {"length": 256, "dtype": torch.bfloat16, "block_size": 128, **options}
    options.setdefault("reach", "window")
    q = torch.zeros(1, options.pop("length"), 1, 64, dtype=options.pop("dtype"))
    window_attention(q.as_subclass(OnGPU), q, q, **options)
    assert [taken in name for name in names] == [[name] == found for name in names]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("carried", [False, True], ids=["no cache", "cache"])
def test_what_a_gpu_takes_equals_the_definition(
    carried: bool, flags: bool, compiled: bool, flash_calls: list[int]
) -> None:
    """These kernels on Hopper, with flash-attn-4 installed; FlexAttention elsewhere."""
    torch._dynamo.reset()
    form = window_attention
    if compiled:
        form = torch.compile(form, fullgraph=True, dynamic=False)
    for width in (64, 128):
        compare(form, carried, flags, (403, 96, 2, width), torch.bfloat16, "cuda")
    assert bool(flash_calls) == (module.FLASH_INSTALLED and on_hopper())


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("length", [1024, 1000], ids=["whole blocks", "a part"])
def test_blocks_that_a_gpu_takes_equal_the_definition(
    length: int, compiled: bool, flash_calls: list[int]
) -> None:
    """As above, of whole blocks; parts of blocks by FlexAttention."""
    torch._dynamo.reset()
    form = window_attention
    if compiled:
        form = torch.compile(form, fullgraph=True, dynamic=False)
    for width in (64, 128):
        compare(form, False, False, (length, 256, 2, width), torch.bfloat16, "cuda", "own")
    assert bool(flash_calls) == (module.FLASH_INSTALLED and on_hopper() and length == 1024)
