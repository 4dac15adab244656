"""A barrier that inductor's Triton kernels lack.

A kernel that reduces a row in several loops may store a tensor in one and read it again in the
next. Triton may give store and load different orders of threads, and inductor puts no barrier
between them (torch 2.11 and 2.13; pytorch/pytorch#190517, triton-lang/triton#10924): a thread may
then read what another has not stored yet. LongVQ's softmax over keys and codes was such a kernel,
and its gradients were wrong by 4e-4 in fp32 on an H100.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

CACHE_TAG = "barriers after loops that store"
MARK = "writes_barriers"  # an attribute of ours; `functools.wraps`, by anyone, copies it


def add_loop_barriers() -> None:
    """Makes inductor end every reduction loop that stores with a barrier, in this process."""
    from torch._inductor.codegen.triton import TritonKernel

    if not hasattr(TritonKernel.codegen_body, MARK):
        TritonKernel.codegen_body = with_barrier(TritonKernel.codegen_body)  # type: ignore[method-assign]
        # Kernels in the cache may have been made without.
        torch.compiler.config.cache_key_tag += CACHE_TAG


def with_barrier(codegen_body: Callable[[Any], None]) -> Callable[[Any], None]:
    """`TritonKernel.codegen_body`, which writes a kernel's next loop, and a barrier behind it."""

    @functools.wraps(codegen_body)
    def codegen(kernel: Any) -> None:
        loop = kernel.inside_reduction and any(tree.is_loop for tree in kernel.range_trees)
        stores = loop and bool(kernel.stores)
        codegen_body(kernel)
        if stores:
            kernel.body.writeline("tl.debug_barrier()")

    setattr(codegen, MARK, True)
    return codegen
