"""quack in its place, for a CPU."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def quack_by_definition(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """quack's product as torch's. The shapes and tiles that it was called with."""
    calls = []

    def fn(a: Tensor, b: Tensor, out: Tensor, *, config: SimpleNamespace) -> None:
        calls.append((tuple(a.shape), tuple(b.shape), config.tile_m, config.tile_n))
        assert a.data_ptr() % 16 == b.data_ptr() % 16 == 0
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
