"""FlashAttention-4, in its place and counted."""

import sys
from types import ModuleType

import pytest
from torch import Tensor

from pretrain.ops import flash_window_attention as module
from tests.pretrain.ops.plain_flash import plain_backward, plain_convert, plain_forward


@pytest.fixture
def plain_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator calls, written out in torch for a CPU."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    interface = sys.modules["flash_attn.cute.interface"]
    monkeypatch.setattr(interface, "_flash_attn_fwd", plain_forward, raising=False)
    monkeypatch.setattr(interface, "_flash_attn_bwd", plain_backward, raising=False)
    monkeypatch.setattr(interface, "_bwd_postprocess_convert", plain_convert, raising=False)


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call of FlashAttention's, of whose arguments each goes through `_rows`."""
    calls: list[int] = []
    rows = module._rows

    def counted(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        calls.append(1)
        return rows(*arguments)

    monkeypatch.setattr(module, "_rows", counted)
    return calls
