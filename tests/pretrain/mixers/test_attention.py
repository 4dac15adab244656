"""Full attention with a mask goes over its queries in blocks; their size changes nothing."""

import pytest
import torch

from pretrain import mixers
from pretrain.mixers import attention


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_blocks_of_queries_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mixer = mixers.build("attention", d_model=8, n_heads=2).double()
    mixer.reset_grid = 8
    x = torch.randn(2, 13 + 27, 8, dtype=torch.float64)
    resets = torch.tensor([[False, True, False], [False, False, False]])
    state = mixer(x[:, :13]).state
    want = mixer(x[:, 13:], state, resets=resets).y
    monkeypatch.setattr(attention, "QUERY_BLOCK", rows)
    torch.testing.assert_close(mixer(x[:, 13:], state, resets=resets).y, want)
