"""Between a loop that stores and one that reads again stands a barrier."""

import functools
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer, run_and_get_code

from pretrain.training.compiled_blocks import compile_blocks
from pretrain.training.loop_barriers import CACHE_TAG, add_loop_barriers, with_barrier


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("stores", [True, False])
def test_a_barrier_follows_a_loop_that_stores_and_nothing_else(loops: bool, stores: bool) -> None:
    barrier = ["tl.debug_barrier()"] if loops and stores else []
    assert _written(with_barrier(_write_loop), loops, stores) == ["for ...", *barrier]


@pytest.mark.parametrize("decorated", [False, True])
def test_compiled_blocks_get_the_barrier_once(
    decorated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over what someone else has made of inductor's method, too, and under it."""

    def decorate(method: Callable[..., None]) -> Callable[..., None]:
        return functools.wraps(method)(lambda kernel: method(kernel)) if decorated else method

    monkeypatch.setattr(TritonKernel, "codegen_body", decorate(_write_loop))
    model = nn.Module()
    model.blocks, model.norm = nn.ModuleList([nn.Identity()]), nn.Identity()
    with torch.compiler.config.patch(cache_key_tag=""):
        compile_blocks(model, backend="eager")
        monkeypatch.setattr(TritonKernel, "codegen_body", decorate(TritonKernel.codegen_body))
        compile_blocks(model, backend="eager")
    assert _written(TritonKernel.codegen_body) == ["for ...", "tl.debug_barrier()"]


def _write_loop(kernel: SimpleNamespace) -> None:
    """Stands for inductor's method."""
    kernel.body.writeline("for ...")
    kernel.stores.clear()


def _written(
    codegen_body: Callable[[SimpleNamespace], None], loops: bool = True, stores: bool = True
) -> list[str]:
    """The lines of a kernel whose next loop may be one, and may store."""
    kernel = SimpleNamespace(
        inside_reduction=True,
        range_trees=[SimpleNamespace(is_loop=False), SimpleNamespace(is_loop=loops)],
        stores=IndentedBuffer(),
        body=IndentedBuffer(),
    )
    if stores:
        kernel.stores.writeline("tl.store(...)")
    codegen_body(kernel)
    return kernel.body.getvalue().splitlines()


def test_inductor_is_changed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = getattr(TritonKernel.codegen_body, "__wrapped__", TritonKernel.codegen_body)
    monkeypatch.setattr(TritonKernel, "codegen_body", before)
    with torch.compiler.config.patch(cache_key_tag=""):
        add_loop_barriers()
        add_loop_barriers()
        assert torch.compiler.config.cache_key_tag == CACHE_TAG
    assert TritonKernel.codegen_body.__wrapped__ is before


@pytest.mark.gpu
def test_no_kernel_reads_what_it_stored_without_a_barrier_between() -> None:
    add_loop_barriers()
    torch._dynamo.reset()

    def waves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.sin()
        return y, y / y.norm(dim=-1, keepdim=True)

    x = torch.randn(4096, 4096, device="cuda")
    found, code = run_and_get_code(torch.compile(waves, dynamic=False), x)
    torch.testing.assert_close(found, waves(x))
    kernels = re.findall(r"@triton\.jit\n(.*?)'''", "".join(code), re.DOTALL)
    again = 0
    for kernel in kernels:
        stored, waited = set[str](), set[str]()
        for line in kernel.splitlines():
            if "tl.debug_barrier()" in line:
                waited |= stored
            for load in re.findall(r"tl\.load\((\w+)", line):
                assert load not in stored - waited, kernel
                again += load in waited
            stores = re.findall(r"tl\.store\((\w+)", line)
            stored.update(stores)
            waited.difference_update(stores)
    assert again, kernels
