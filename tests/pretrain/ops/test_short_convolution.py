"""The short convolution against torch's, one document at a time."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from pretrain.ops.short_convolution import short_convolution

CHANNELS, TAPS, LENGTH = 3, 4, 19


@pytest.mark.parametrize("sizes", [[LENGTH], [1] * LENGTH, [2, 9, 8]], ids=str)
@pytest.mark.parametrize("grid", [1, 2, 5])
def test_documents_and_splits_equal_separate_convolutions(sizes: list[int], grid: int) -> None:
    generator = torch.Generator().manual_seed(grid)
    x = torch.randn(1, LENGTH, CHANNELS, generator=generator, dtype=torch.float64)
    weight = torch.randn(CHANNELS, TAPS, generator=generator, dtype=torch.float64)
    bias = torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
    begins = torch.rand(LENGTH, generator=generator) < 0.4
    begins[torch.arange(LENGTH) % grid > 0] = False

    outputs, state, start = [], None, 0
    for size in sizes:
        edges = range(-start % grid, max(size, -start % grid), grid)
        resets = begins[start : start + size][list(edges)].unsqueeze(0)
        y, state = short_convolution(
            x[:, start : start + size],
            weight,
            bias,
            state,
            resets=resets if edges else None,
            edges=edges,
        )
        outputs.append(y)
        start += size

    starts = [0, *(t for t in range(1, LENGTH) if begins[t]), LENGTH]
    want = [
        F.conv1d(
            F.pad(x[:, a:b].transpose(1, 2), (TAPS - 1, 0)),
            weight.unsqueeze(1),
            bias,
            groups=CHANNELS,
        ).transpose(1, 2)
        for a, b in pairwise(starts)
    ]
    torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(want, 1), rtol=0, atol=1e-13)
    last = F.pad(x[:, starts[-2] :], (0, 0, TAPS - 1, 0))[:, 1 - TAPS :]
    assert state is not None
    assert torch.equal(state, last)
