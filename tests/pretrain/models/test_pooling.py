"""A mean is of tokens, whatever stands behind them."""

import torch

from pretrain.models.pooling import mean_over_tokens


def test_pads_may_hold_anything_and_the_mean_is_wide():
    x = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    lengths = [7, 3, 1]
    padding = torch.arange(7) >= torch.tensor(lengths)[:, None]
    expected = torch.stack([row[:n].float().mean(0) for row, n in zip(x, lengths, strict=True)])
    for anything in (float("inf"), float("nan"), 0.0):
        found = mean_over_tokens(x.masked_fill(padding.unsqueeze(-1), anything), padding)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mean_over_tokens(x), x.float().mean(1))
