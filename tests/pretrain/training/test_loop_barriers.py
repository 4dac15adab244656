"""Between a loop that stores and one that reads again stands a barrier."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.utils import IndentedBuffer, run_and_get_code

from pretrain.training.loop_barriers import CACHE_TAG, add_loop_barriers, with_barrier


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("stores", [True, False])
def test_a_barrier_follows_a_loop_that_stores_and_nothing_else(loops: bool, stores: bool) -> None:
    kernel = SimpleNamespace(
        inside_reduction=True,
        range_trees=[SimpleNamespace(is_loop=False), SimpleNamespace(is_loop=loops)],
        stores=IndentedBuffer(),
        body=IndentedBuffer(),
    )
    if stores:
        kernel.stores.writeline("tl.store(...)")

    def codegen_body(kernel: SimpleNamespace) -> None:
        kernel.body.writeline("for ...")
        kernel.stores.clear()

    with_barrier(codegen_body)(kernel)
    barrier = ["tl.debug_barrier()"] if loops and stores else []
    assert kernel.body.getvalue().splitlines() == ["for ...", *barrier]


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
