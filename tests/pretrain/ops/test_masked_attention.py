"""Masks never meet cuDNN, and no mask means causal."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops import masked_attention as module
from pretrain.ops.masked_attention import masked_attention


def test_a_mask_keeps_cudnn_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backward gives NaN on Hopper for rows that begin with hidden tiles."""
    allowed: list[bool] = []
    fused = F.scaled_dot_product_attention

    def watched(*arguments: Any, **options: Any) -> Tensor:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*arguments, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", watched)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    q = torch.randn(1, 1, 4, 8)
    masked_attention(q, q, q, torch.ones(4, 4, dtype=torch.bool).tril(), None)
    assert allowed == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("scale", [None, 1.0])
def test_no_mask_is_the_causal_one_or_none(scale: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 8, dtype=torch.float64).unbind(0)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(
        masked_attention(q, k, v, None, scale), masked_attention(q, k, v, mask, scale)
    )
    everything = torch.ones_like(mask)
    torch.testing.assert_close(
        masked_attention(q, k, v, None, scale, causal=False),
        masked_attention(q, k, v, everything, scale),
    )
