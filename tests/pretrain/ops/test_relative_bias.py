"""T5's buckets are those of transformers; biases read them off the table."""

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from pretrain.ops.relative_bias import T5Bias, sums_of_diagonals, t5_buckets, toeplitz_bias


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_those_of_t5(causal: bool) -> None:
    distances = torch.arange(-1000, 1001)
    # Theirs takes the key's position minus the query's.
    want = T5Attention._relative_position_bucket(-distances, bidirectional=not causal)
    assert torch.equal(t5_buckets(distances, causal=causal), want)


def test_bias_by_distance_reads_the_table() -> None:
    t5 = T5Bias(3)
    torch.nn.init.normal_(t5.table, generator=torch.Generator().manual_seed(0))
    bias = t5(torch.arange(300))
    assert torch.equal(bias[:, :16], t5.table[:, :16])  # the near half is exact
    assert (bias[:, 128:] == t5.table[:, 31:]).all()  # all that is far looks alike


@pytest.mark.parametrize(
    ("distances", "queries", "keys", "newest"),
    [(12, 6, 12, 11), (12, 1, 5, 4), (12, 5, 1, 7), (12, 3, 7, 3), (14, 4, 9, 11)],
    ids=["own and previous", "one query", "one key", "keys ahead", "all keys behind"],
)
def test_a_matrix_and_its_gradient_are_those_of_reading_the_bias_entry_by_entry(
    distances: int, queries: int, keys: int, newest: int
) -> None:
    torch.manual_seed(0)
    bias = torch.randn(3, distances, dtype=torch.float64, requires_grad=True)
    distance = newest + torch.arange(queries).unsqueeze(1) - (queries - 1) - torch.arange(keys)
    behind = distance >= 0
    want = bias[:, distance.clamp(min=0)]
    got = toeplitz_bias(bias, queries, keys, newest)
    assert torch.equal(got * behind, want * behind)
    d = torch.randn_like(got) * behind
    gradients = [torch.autograd.grad(x, bias, d)[0] for x in (got, want)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    whole = torch.randn_like(got)  # what lies ahead has no gradient to give
    torch.testing.assert_close(
        *(torch.autograd.grad(got, bias, x)[0] for x in (whole, whole * behind))
    )


@pytest.mark.parametrize(("lines", "columns", "length"), [(3, 5, 7), (5, 3, 9), (1, 1, 1)])
def test_diagonals_are_summed_from_the_lowest_line_on(
    lines: int, columns: int, length: int
) -> None:
    x = torch.randn(2, lines, columns, dtype=torch.float64)
    found = sums_of_diagonals(x, length)
    assert found.shape == (2, length)
    for place in range(length):
        want = x.diagonal(place - (lines - 1), 1, 2).sum(1) if place < lines + columns - 1 else 0
        assert (found[:, place] - want).abs().max() < 1e-12


def test_inductor_compiles_a_matrix_of_biases_as_it_does_on_a_gpu() -> None:
    """There it fuses `torch.cat`, on a CPU only when told to; clamped first, buckets stopped it."""
    t5, window = T5Bias(2), 8
    torch.nn.init.normal_(t5.table, generator=torch.Generator().manual_seed(0))

    def matrix() -> Tensor:
        return toeplitz_bias(t5(torch.arange(2 * window)), window, 2 * window, 2 * window - 1)

    with torch.no_grad(), torch._inductor.config.patch(force_pointwise_cat=True):
        compiled = torch.compile(matrix, fullgraph=True, dynamic=False)()
    assert torch.equal(compiled, matrix())
