"""Attention out of the joined projection equals its two halves, values and gradients."""

import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pretrain.ops import projected_window as module
from pretrain.ops.flash_window_attention import FLASH_INSTALLED
from pretrain.ops.projected_window import (
    flash_projected_window_attention,
    projected_window_attention,
    projected_window_backward,
)
from pretrain.ops.qkv_heads import prepare_qkv_naive
from pretrain.ops.window_attention import TILE, window_attention_naive
from tests.pretrain.ops import plain_flash
from tests.pretrain.ops.plain_flash import on_hopper

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    length: int = 19
    block_size: int = 4
    heads: int = 3
    width: int = 8
    scaled: bool = True
    base: float | None = 100.0
    keep: int = 4
    documents: bool = False


CASES = {
    "norms and positions": Case(),
    "documents": Case(documents=True),
    "positions": Case(scaled=False),
    "norms": Case(base=None),
    "fewer tokens than kept": Case(length=3, documents=True),
    "nothing kept": Case(keep=0),
    "heads of 128": Case(83, 16, 3, 128, keep=16),
    "heads of 128, positions": Case(64, 16, 1, 128, scaled=False, keep=0),
    "heads of 128, documents": Case(83, 16, 3, 128, keep=16, documents=True),
}
GPU_CASES = {
    "heads of 64": Case(403, 96, 2, 64, keep=96),
    "heads of 128, documents": Case(403, 96, 2, 128, keep=96, documents=True),
    "8 heads of 128, no norms": Case(256, 128, 8, 128, scaled=False, keep=0),
}
USED = [(True, True), (True, False), (False, True)]  # attention, what a state keeps


def definition(
    qkv: Tensor,
    *,
    block_size: int,
    scale: Tensor | None,
    base: float | None,
    keep: int,
    **more: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    heads = prepare_qkv_naive(qkv, scale=scale, base=base, keep=keep)
    of_scores = None if scale is None else 1.0
    options = {"block_size": block_size, "reach": "window", "scale": of_scores}
    y = window_attention_naive(heads.q, heads.k, heads.v, **options, **more)
    return y, heads.kept


def problem(case: Case, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves, qkv and the scales, and options."""
    torch.manual_seed(0)
    shape = (2, case.length, 3, case.heads, case.width)
    leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_()]
    if case.scaled:
        leaves.append((3 + torch.rand(case.heads, device=device)).requires_grad_())
    options = {"block_size": case.block_size, "base": case.base, "keep": case.keep}
    blocks = -(-case.length // case.block_size)
    if case.documents:
        options["fresh"] = torch.rand(2, blocks, device=device) < 0.4
    return leaves, options


def check(form: Any, case: Case, dtype: torch.dtype, device: str) -> None:
    """Against the definition in fp64."""
    leaves, options = problem(case, dtype, device)
    for used in USED if case.keep else USED[1:2]:
        results = []
        for function, kind in ((form, dtype), (definition, torch.float64)):
            wide = torch.promote_types(kind, torch.float32)
            qkv, *scales = (leaf.to(kind if i == 0 else wide) for i, leaf in enumerate(leaves))
            # Memory that is handed out again: what a kernel leaves unwritten then shows.
            spoiled = [torch.full_like(qkv, torch.nan) for _ in range(16)]
            del spoiled
            y, kept = function(qkv, scale=scales[0] if scales else None, **options)
            outputs = [
                part
                for part, wanted in zip((y, *kept), used[:1] + 2 * used[1:], strict=True)
                if wanted
            ]
            loss = sum((part.double().sin() * part.double()).sum() for part in outputs)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            results.append([y, *kept, *gradients])
        for got, want in zip(*results, strict=True):
            assert got.shape == want.shape
            error = (got.double() - want.double()).norm()
            assert error <= BOUNDS[dtype] * want.double().norm(), (error, used)


@pytest.mark.triton
@pytest.mark.usefixtures("plain_flash")
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_definition_where_flash_does_what_it_says(name: str) -> None:
    check(flash_projected_window_attention, CASES[name], torch.float32, "cpu")


@pytest.fixture
def wide_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """`plain_flash`, which is in place, adds up in fp32 and rounds what it returns."""
    interface = sys.modules["flash_attn.cute.interface"]

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor | None, ...]:
        y, *rest = plain_flash.plain_forward(q.float(), k.float(), v.float(), **options)
        return y.to(q.dtype), *rest

    def backward(*tensors: Tensor, **options: Any) -> None:
        plain_flash.plain_backward(*(t.float() for t in tensors), **options)

    monkeypatch.setattr(interface, "_flash_attn_fwd", forward)
    monkeypatch.setattr(interface, "_flash_attn_bwd", backward)


@pytest.fixture
def seen_anew() -> Iterator[None]:
    module.reads_sums.cache_clear()
    yield
    module.reads_sums.cache_clear()


@pytest.mark.triton
@pytest.mark.usefixtures("plain_flash", "wide_flash", "seen_anew")
@pytest.mark.parametrize("name", ["norms and positions", "documents", "heads of 128"])
def test_in_bf16_it_stays_close_to_the_definition(name: str) -> None:
    check(flash_projected_window_attention, CASES[name], torch.bfloat16, "cpu")
    # Where the sums are not read, that pass is not what was compared.
    assert module.reads_sums(torch.device("cpu"), torch.bfloat16)


@pytest.mark.triton
@pytest.mark.usefixtures("plain_flash", "seen_anew")
def test_sums_in_the_order_that_is_read_are_read() -> None:
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.reads_sums(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.triton
@pytest.mark.usefixtures("plain_flash", "seen_anew")
def test_sums_in_another_order_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the package, and the result is right."""
    rows = torch.arange(64 * 128).view(64, 128)
    monkeypatch.setattr(plain_flash, "register_order", lambda: rows)
    with pytest.warns(UserWarning, match="in another order"):
        check(flash_projected_window_attention, CASES["heads of 128"], torch.float32, "cpu")


@pytest.mark.triton
@pytest.mark.usefixtures("plain_flash")
@pytest.mark.parametrize("name", ["norms and positions", "documents"])
def test_a_compiled_graph_holds_it_whole(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        flash_projected_window_attention, fullgraph=True, dynamic=False, backend="aot_eager"
    )
    check(compiled, CASES[name], torch.float32, "cpu")


@pytest.mark.triton
@pytest.mark.usefixtures("plain_flash")
@pytest.mark.parametrize("kept", [0, 2])
def test_the_operator_keeps_the_rules_of_torch_library(kept: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 6, 3, 2, 4)
    scale, cos, sin = torch.rand(2), torch.randn(6, 1, 2), torch.randn(6, 1, 2)
    q, k, y, d_y = torch.randn(4, 2, 6, 2, 4)
    sums, d_last = 5 + torch.rand(2, 2, 6), torch.randn(2, kept, 2, 2, 4)
    given = d_y, d_last, qkv, q, k, y, sums, scale, cos, sin, None, None, 3, 1.0
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(projected_window_backward, given, test_utils=tests)


@pytest.mark.parametrize("name", CASES)
def test_where_flash_does_not_serve_it_is_its_two_halves(name: str) -> None:
    check(projected_window_attention, CASES[name], torch.float32, "cpu")


def test_a_stream_goes_on_from_what_was_kept() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 20, 3, 2, 8)
    scale = torch.rand(2)
    options = {"block_size": 4, "scale": scale, "keep": 4}
    whole, _ = projected_window_attention(qkv, **options)
    first, kept = projected_window_attention(qkv[:, :12], **options)
    second, _ = projected_window_attention(qkv[:, 12:], kept, **options)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


class OnGPU(Tensor):
    is_cuda = True
    device = torch.device("cuda")


class HalvesTaken(Exception):
    pass


@pytest.mark.parametrize(
    ("options", "joined"),
    [
        ({}, True),
        ({"scale": None}, True),
        ({"base": None}, True),
        ({"scale": None, "base": None}, False),
        ({"cache": (torch.zeros(1, 4, 1, 64),) * 2}, False),
        ({"bias": torch.zeros(1, 128)}, False),
        ({"length": TILE - 1}, False),
        ({"dtype": torch.float32}, False),
    ],
    ids=str,
)
def test_which_form_a_hopper_takes(
    options: dict[str, Any], joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halves(*arguments: Any, **more: Any) -> None:
        raise HalvesTaken

    monkeypatch.setattr("pretrain.ops.flash_window_attention.FLASH_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "flash_projected_window_attention", lambda qkv, **more: "joined")
    monkeypatch.setattr(module, "prepare_qkv", halves)
    options = {"scale": torch.ones(1), "base": 100.0, "block_size": 128, **options}
    shape = 1, options.pop("length", TILE), 3, 1, 64
    qkv = torch.zeros(shape, dtype=options.pop("dtype", torch.bfloat16)).as_subclass(OnGPU)
    if joined:
        assert projected_window_attention(qkv, **options) == "joined"
    else:
        with pytest.raises(HalvesTaken):
            projected_window_attention(qkv, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", GPU_CASES)
def test_what_a_gpu_takes_equals_the_definition(
    name: str, compiled: bool, flash_calls: list[int]
) -> None:
    """The operators on Hopper, with flash-attn-4 installed; their two halves elsewhere."""
    torch._dynamo.reset()
    form = module.projected_window_attention
    if compiled:
        form = torch.compile(form, fullgraph=True, dynamic=False)
    check(form, GPU_CASES[name], torch.bfloat16, "cuda")
    assert bool(flash_calls) == (FLASH_INSTALLED and on_hopper())
    if flash_calls:  # and nothing falls back to the pass that converts
        assert module.reads_sums(torch.device("cuda", 0), torch.bfloat16)
