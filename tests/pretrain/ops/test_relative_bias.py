"""T5's buckets, against their definition in whole numbers.

`T5Attention._relative_position_bucket` of transformers 5.23 gives the same buckets for distances
up to 600 on both sides; it is not imported here because it would bring 150 MB to the tests.
"""

import pytest
import torch

from pretrain.ops.relative_bias import T5Bias, t5_buckets


def bucket(distance: int, exact: int, buckets: int, max_distance: int) -> int:
    """The last bucket b whose first distance, exact (max / exact)^((b - exact) / (n - exact)), is
    not beyond `distance`; both sides raised to the power n - exact, so nothing is rounded."""
    if distance < exact:
        return distance
    steps, ratio = buckets - exact, max_distance // exact
    return max(exact + j for j in range(steps) if distance**steps >= exact**steps * ratio**j)


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_those_of_t5(causal: bool) -> None:
    got = t5_buckets(torch.arange(-600, 600), causal=causal).tolist()
    for distance, found in zip(range(-600, 600), got, strict=True):
        if causal:
            assert found == bucket(max(distance, 0), 16, 32, 128)
        else:
            assert found == bucket(abs(distance), 8, 16, 128) + 16 * (distance < 0)


def test_bias_by_distance_reads_the_table() -> None:
    t5 = T5Bias(3)
    torch.nn.init.normal_(t5.table, generator=torch.Generator().manual_seed(0))
    bias = t5(torch.arange(300))
    assert torch.equal(bias[:, :16], t5.table[:, :16])  # the near half is exact
    assert (bias[:, 128:] == t5.table[:, 31:]).all()  # all that is far looks alike
