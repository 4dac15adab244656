"""Every example once an epoch, at any place at once, beside others of its length."""

from itertools import islice

import numpy as np
import pytest

from pretrain.finetuning.order import batches, micro_batches

LENGTHS = np.random.default_rng(0).integers(1, 500, 400)


def test_every_epoch_is_a_permutation_and_can_be_entered_anywhere():
    seen = list(islice(batches(LENGTHS[:10], 3, seed=0), 9))
    for epoch in range(3):
        assert len(set(np.concatenate(seen[3 * epoch : 3 * epoch + 3]))) == 9
    assert not np.array_equal(np.concatenate(seen[:3]), np.concatenate(seen[3:6]))
    for skip in (1, 3, 7):
        np.testing.assert_array_equal(next(batches(LENGTHS[:10], 3, 0, skip)), seen[skip])
    other = list(islice(batches(LENGTHS[:10], 3, seed=1), 3))
    assert not np.array_equal(np.concatenate(seen[:3]), np.concatenate(other))
    with pytest.raises(ValueError, match="batch_size=11 is more than the 10"):
        next(batches(LENGTHS[:10], 11, 0))


def test_batches_hold_examples_of_similar_length():
    chosen = list(islice(batches(LENGTHS, 10, 0), 40))
    assert np.mean([np.ptp(LENGTHS[batch]) for batch in chosen]) < 0.1 * np.ptp(LENGTHS)
    means = [LENGTHS[batch].mean() for batch in chosen]
    assert abs(np.corrcoef(means, range(40))[0, 1]) < 0.6  # and long ones do not come last


def test_micro_batches_hold_every_example_once_within_their_bound():
    lengths = np.array([5, 90, 20, 20, 3, 40])
    parts = micro_batches(lengths, 60)
    assert sorted(np.concatenate(parts)) == list(range(6))
    for part in parts:
        assert len(part) == 1 or len(part) * lengths[part].max() <= 60
    assert len(micro_batches(lengths, 10**6)) == 1
    assert micro_batches(lengths[:0], 60) == []
