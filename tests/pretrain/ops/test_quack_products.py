"""Products are quack's where it makes them faster, and come out the same."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.ops import quack_products as module
from pretrain.ops.cross_entropy import linear_cross_entropy
from pretrain.ops.quack_products import (
    ENOUGH_TILES,
    QUACK_INSTALLED,
    SHORT,
    product,
    quack_is_faster,
    tile_of,
    write_product,
)


@pytest.mark.usefixtures("quack_by_definition")
def test_the_operators_keep_the_rules_of_torch_library() -> None:
    a, b = torch.randn(3, 4), torch.randn(128, 4).T
    torch.library.opcheck(product, (a, b))
    torch.library.opcheck(write_product, (a, b, torch.empty(3, 128)))


@pytest.mark.parametrize(
    ("columns", "tile"),
    [
        (3072, (128, 192)),
        (32128, (128, 192)),
        (1024, (192, 128)),
        (100 * 128 + 8, (192, 128)),
        (64, None),
        (100 * 128 - 8, None),
    ],
)
def test_tiles_are_full_but_for_one_of_a_hundred(
    columns: int, tile: tuple[int, int] | None
) -> None:
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
def test_it_is_for_many_short_rows_and_full_tiles() -> None:
    assert is_faster()
    assert is_faster(inner=SHORT)
    assert is_faster(rows=128 * ENOUGH_TILES, columns=192)
    assert is_faster(rows=ENOUGH_ROWS // 8, columns=1024)
    assert not is_faster(rows=ENOUGH_ROWS - 1)
    assert not is_faster(inner=SHORT + 8)
    assert not is_faster(inner=12)
    assert is_faster(columns=128 * 101 + 8)
    assert not is_faster(columns=128 * 101 + 4)
    assert not is_faster(columns=64)
    assert not is_faster(dtype=torch.float32)
    assert not is_faster(turned=True)
    on_cpu = torch.empty(ENOUGH_ROWS, 8).bfloat16(), torch.empty(8, 128).bfloat16()
    assert not quack_is_faster(*on_cpu)


@pytest.mark.usefixtures("installed_on_hopper")
def test_code_can_be_traced_that_asks() -> None:
    """A graph breaks at what a tensor has only while it runs, such as its address."""
    a, b = torch.empty(ENOUGH_ROWS, 8).bfloat16(), torch.empty(8, 128).bfloat16()
    asking = torch.compile(quack_is_faster, fullgraph=True, backend="eager")
    assert asking(a, b) == quack_is_faster(a, b)


@pytest.mark.usefixtures("quack_by_definition")
@pytest.mark.parametrize("turned", [False, True])
def test_operands_may_begin_anywhere(turned: bool) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(1 + 3 * 8)[1:].view(3, 8), torch.randn(1 + 8 * 128)[1:]
    b = b.view(128, 8).T if turned else b.view(8, 128)
    torch.testing.assert_close(product(a, b), a @ b)  # a copy is summed in another order


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


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_gives_it_its_logits(
    compiled: bool, quack_by_definition: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8), torch.randn(128, 8)
    arguments = hidden, weight, torch.randint(0, 128, (7,)), torch.ones(7, dtype=torch.bool)
    want = linear_cross_entropy(*arguments, chunk_size=4)
    assert not quack_by_definition
    monkeypatch.setattr("pretrain.ops.cross_entropy.quack_is_faster", lambda a, b: True)
    loss = linear_cross_entropy
    if compiled:
        loss = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(loss(*arguments, chunk_size=4), want)
    assert [call[:2] for call in quack_by_definition] == [((4, 8), (8, 128)), ((3, 8), (8, 128))]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_logits_equal_the_definition(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk's, of the width and vocabulary of the 350M models."""
    torch._dynamo.reset()
    served = []
    monkeypatch.setattr(
        "pretrain.ops.cross_entropy.quack_is_faster",
        lambda a, b: served.append(quack_is_faster(a, b)) or served[-1],
    )
    torch.manual_seed(0)
    hidden = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(32128, 1024, device="cuda", dtype=torch.bfloat16) / 32
    targets = torch.randint(0, 32128, (4096,), device="cuda")
    mask = torch.ones(4096, dtype=torch.bool, device="cuda")
    loss = linear_cross_entropy
    if compiled:
        loss = torch.compile(loss, fullgraph=True, dynamic=False)
    found = loss(hidden, weight, targets, mask)
    want = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    assert (found.nll - want).norm() < 1e-2 * want.norm()
    assert compiled or served == [QUACK_INSTALLED and torch.cuda.get_device_capability()[0] == 9]
