"""A block is its two equations: norms, residuals and MLPs, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain import mixers
from pretrain.models.block import Block, keep_states

D_MODEL, D_FF = 8, 12


def swiglu(block: Block, x: Tensor) -> Tensor:
    gate, up = block.mlp.in_proj.weight.chunk(2)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ block.mlp.out_proj.weight.T


def gelu(block: Block, x: Tensor) -> Tensor:
    return F.gelu(x @ block.mlp.in_proj.weight.T) @ block.mlp.out_proj.weight.T


@pytest.mark.parametrize("mlp", [swiglu, gelu])
@pytest.mark.parametrize("in_two_parts", [False, True])
def test_block_mixes_tokens_then_channels_each_normed_and_added(mlp, in_two_parts) -> None:
    torch.manual_seed(0)
    mixer = mixers.build("attention", d_model=D_MODEL, n_heads=2)
    block = Block("attention", mixer, d_model=D_MODEL, d_ff=D_FF, mlp=mlp.__name__).double()
    for norm in (block.mixer_norm, block.mlp_norm):
        torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, D_MODEL, dtype=torch.float64)
    mixed = x + mixer(F.rms_norm(x, (D_MODEL,), block.mixer_norm.weight, 1e-6)).y
    want = mixed + mlp(block, F.rms_norm(mixed, (D_MODEL,), block.mlp_norm.weight, 1e-6))
    if in_two_parts:
        part = torch.randn_like(x)
        output = block(x - part, added=part)
    else:
        output = block(x)
    torch.testing.assert_close(output.x, mixed)
    torch.testing.assert_close(output.stream, want)


def test_states_that_nothing_carries_are_returned_in_evaluation_alone() -> None:
    mixer = mixers.build("swa", d_model=D_MODEL, n_heads=2, window_size=4)
    block = Block("swa", mixer, d_model=D_MODEL, d_ff=D_FF, mlp="gelu")
    x = torch.randn(1, 4, D_MODEL)
    assert block(x).state is not None
    keep_states(torch.nn.ModuleList([block]), False)
    assert block(x).state is None
    assert block.eval()(x).state is not None
    keep_states(block, True)
    assert block.train()(x).state is not None
