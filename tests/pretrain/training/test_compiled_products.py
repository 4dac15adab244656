"""Compiled blocks give quack the products that it makes faster, and they come out the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pretrain.ops import quack_products
from pretrain.ops.quack_products import QUACK_INSTALLED, quack_is_faster
from pretrain.training import compiled_products as module
from pretrain.training.compiled_blocks import compile_blocks
from pretrain.training.compiled_products import FasterProducts


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


def test_what_it_is_given_lies_as_it_was_when_that_was_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inductor forms what is concatenated in its place in the whole, in rows that lie apart."""
    strides = []

    def write(a: Tensor, b: Tensor, y: Tensor) -> None:
        strides.append(a.stride())
        torch.mm(a, b, out=y)

    monkeypatch.setattr(quack_products, "write_product", write)
    monkeypatch.setattr(module, "quack_is_faster", lambda a, b: a.stride() == (a.shape[1], 1))

    class Joins(nn.Module):
        def forward(self, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
            a = x.softmax(-1)
            rest = [(more * scale).softmax(-1) for scale in range(1, 10)]
            return torch.cat([a, *rest], -1).T.contiguous(), a @ a.T

    model = Model(8, 8)
    model.blocks = nn.ModuleList([Joins()])
    torch._dynamo.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        compile_blocks(model)
        model.blocks[0](torch.randn(256, 96), torch.randn(256, 1))
    assert strides == [(96, 1)]


def products_of(form: Callable[..., Any]) -> list[str]:
    """What the pass makes of the products of two fake matrices on a GPU."""
    with FakeTensorMode():
        a = torch.empty(8, 16, device="cuda", dtype=torch.bfloat16)
        traced = make_fx(form)(a, torch.empty(16, 4, device="cuda", dtype=torch.bfloat16))
    FasterProducts()(traced.graph)
    traced.graph.lint()
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]


def test_a_product_that_is_only_widened_is_returned_wide() -> None:
    def widen(y: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ops.prims.convert_element_type.default(y, dtype)

    assert products_of(lambda a, b: widen(a @ b)) == ["aten.mm.dtype"]
    conversion = "prims.convert_element_type.default"
    for form in (
        lambda a, b: (widen(y := a @ b), y),
        lambda a, b: widen(a @ b, torch.float16),
        lambda a, b: widen(widen(a) @ widen(b), torch.float64),
    ):
        found = products_of(form)
        assert "aten.mm.default" in found
        assert conversion in found


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
    rounded = got[2].bfloat16() == got[2]
    assert rounded.float().mean() < 0.1  # the weight's gradient is not
    hopper = torch.cuda.get_device_capability()[0] == 9
    # Forward; the input's gradient, whose rows are short for 1,024 columns only; the weight's.
    assert sum(served) == (QUACK_INSTALLED and hopper) * (1 + (columns == 1024))
