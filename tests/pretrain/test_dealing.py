"""All work is dealt out, once and evenly."""

import numpy as np
import pytest

from pretrain.dealing import deal


@pytest.mark.parametrize("hands", [1, 2, 3, 7, 50])
def test_work_is_dealt_out_once_and_evenly(hands):
    sizes = [*np.random.default_rng(0).integers(1, 20, 10).tolist(), *range(100, 2000, 100)]
    dealt = deal(sizes, hands)
    assert sorted(piece for hand in dealt for piece in hand) == list(range(len(sizes)))
    assert all(hand == sorted(hand) for hand in dealt)
    loads = [sum(sizes[piece] for piece in hand) for hand in dealt]
    assert len(loads) == hands
    assert max(loads) - min(loads) <= max(sizes)
