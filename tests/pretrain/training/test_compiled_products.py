"""Compiled blocks give quack the products that it makes faster, and they come out the same."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.ops.swiglu_quack import QUACK_INSTALLED
from pretrain.training import compiled_products as module
from pretrain.training.compiled_blocks import compile_blocks
from pretrain.training.compiled_products import (
    ENOUGH_TILES,
    SHORT,
    product,
    quack_is_faster,
    tile_of,
)


@pytest.fixture
def quack_by_definition(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """quack's product as torch's. The shapes and tiles that it was called with."""
    calls = []

    def fn(a: Tensor, b: Tensor, out: Tensor, *, config: SimpleNamespace) -> None:
        calls.append((tuple(a.shape), tuple(b.shape), config.tile_m, config.tile_n))
        torch.mm(a, b, out=out)

    for name, attribute, value in (
        ("quack", "", None),
        ("quack.gemm_config", "GemmConfig", SimpleNamespace),
        ("quack.gemm_interface", "gemm_tuned", SimpleNamespace(fn=fn)),
    ):
        stand_in = ModuleType(name)
        setattr(stand_in, attribute, value)
        monkeypatch.setitem(sys.modules, name, stand_in)
    return calls


class Block(nn.Module):
    """One product: of a bare nn.Linear torch would compile nothing."""

    def __init__(self, width: int, columns: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, columns, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


class Model(nn.Module):
    """What `compile_blocks` takes for a model."""

    def __init__(self, width: int, columns: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, columns)])
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks[0](x))


def test_compiled_blocks_give_it_what_it_makes_faster_forward_and_backward(
    quack_by_definition: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "quack_is_faster", lambda a, b: a.shape[0] == 10)
    torch.manual_seed(0)
    model, x = Model(192, 384), torch.randn(2, 5, 192, requires_grad=True)
    leaves = [x, *model.parameters()]
    want = model(x)
    weights = torch.randn_like(want)
    gradients = torch.autograd.grad((want * weights).sum(), leaves)
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        compile_blocks(model)
        got = model(x)
        found = torch.autograd.grad((got * weights).sum(), leaves)
    torch.testing.assert_close([got, *found], [want, *gradients])
    # The weight's gradient is a product of (384, 10), which it is not given.
    shapes = [((10, 192), (192, 384)), ((10, 384), (384, 192))]
    assert quack_by_definition == [(*shape, 128, 192) for shape in shapes]


@pytest.mark.usefixtures("quack_by_definition")
def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    torch.library.opcheck(product, (torch.randn(3, 4), torch.randn(128, 4).T))


@pytest.mark.parametrize(("columns", "tile"), [(3072, (128, 192)), (1024, (192, 128)), (64, None)])
def test_tiles_are_whole_in_columns(columns: int, tile: tuple[int, int] | None) -> None:
    assert tile_of(columns) == tile


class OnGPU(Tensor):
    is_cuda = True


@pytest.fixture
def installed_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUACK_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


ENOUGH_ROWS = 192 * ENOUGH_TILES  # for one tile of 128 columns


def is_faster(
    rows: int = ENOUGH_ROWS,
    inner: int = 8,
    columns: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    turned: bool = False,
) -> bool:
    a, b = torch.empty(rows, inner, dtype=dtype), torch.empty(inner, columns, dtype=dtype)
    if turned:
        a = torch.empty(inner, rows, dtype=dtype).T
    return quack_is_faster(a.as_subclass(OnGPU), b)


@pytest.mark.usefixtures("installed_on_hopper")
def test_it_is_for_many_short_rows_and_whole_tiles() -> None:
    assert is_faster()
    assert is_faster(inner=SHORT)
    assert is_faster(rows=128 * ENOUGH_TILES, columns=192)
    assert is_faster(rows=ENOUGH_ROWS // 8, columns=1024)
    assert not is_faster(rows=ENOUGH_ROWS - 1)
    assert not is_faster(inner=SHORT + 8)
    assert not is_faster(inner=12)
    assert not is_faster(columns=64)
    assert not is_faster(dtype=torch.float32)
    assert not is_faster(turned=True)
    on_cpu = torch.empty(ENOUGH_ROWS, 8).bfloat16(), torch.empty(8, 128).bfloat16()
    assert not quack_is_faster(*on_cpu)


@pytest.mark.usefixtures("installed_on_hopper")
@pytest.mark.parametrize(
    ("place", "name", "found"),
    [
        (module, "QUACK_INSTALLED", False),
        (torch.cuda, "get_device_capability", lambda device: (10, 0)),
    ],
    ids=["not installed", "Blackwell"],
)
def test_it_is_for_nothing_else(
    place: Any, name: str, found: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, found)
    assert not is_faster()


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [3072, 1024])
def test_products_of_a_compiled_block_equal_the_definition(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """quack's on Hopper, where it is installed; cuBLAS's elsewhere."""
    served = []
    monkeypatch.setattr(
        module, "quack_is_faster", lambda a, b: served.append(quack_is_faster(a, b)) or served[-1]
    )
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model(1024, columns).cuda()
    x = torch.randn(2, 2**14 + 8, 1024, device="cuda", requires_grad=True)
    leaves = [x, *model.parameters()]
    weights = torch.randn(*x.shape[:2], columns, device="cuda")
    exact = x.double() @ model.blocks[0].projection.weight.double().T
    want = [exact, *torch.autograd.grad((exact * weights).sum(), leaves)]
    with torch.compiler.config.patch(force_disable_caches=True):
        compile_blocks(model)
        with torch.autocast("cuda", torch.bfloat16):
            y = model(x)
        got = [y, *torch.autograd.grad((y * weights).sum(), leaves)]
    for found, right in zip(got, want, strict=True):
        assert (found.double() - right).norm() < 1e-2 * right.norm()
    hopper = torch.cuda.get_device_capability()[0] == 9
    # Forward; the input's gradient, whose rows are short for 1,024 columns only; the weight's.
    assert sum(served) == (QUACK_INSTALLED and hopper) * (1 + (columns == 1024))
