"""Attention to the states of one's own block."""

import pytest
import torch

from pretrain.ops.state_attention import state_attention, state_attention_naive

W, BATCH, HEADS, STATES, WIDTH = 8, 2, 2, 3, 4
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("offset", "length"), [(0, W), (0, 3 * W + 3), (3, 1), (3, 4 * W), (7, 2)])
def test_runs_of_blocks_equal_single_tokens(offset: int, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = -(-(offset + length) // W)
    shapes = [(BATCH, length), (BATCH, blocks, STATES), (BATCH, blocks, STATES)]
    tensors = [torch.randn(*s, HEADS, WIDTH).to(dtype).requires_grad_() for s in shapes]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y = state_attention(*tensors, block_size=W, offset=offset)
    want = state_attention_naive(*wide, block_size=W, offset=offset)
    weights = torch.randn(want.shape).double()
    got = [y, *torch.autograd.grad((y.double() * weights).sum(), tensors)]
    wanted = [want, *torch.autograd.grad((want * weights).sum(), wide)]
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).norm() < BOUNDS[dtype] * b.norm()
