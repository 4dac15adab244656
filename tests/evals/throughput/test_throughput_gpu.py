"""What only a GPU can show."""

import pytest
import torch

from evals.throughput.device_time import device_time
from evals.throughput.fla_kernels import window_flash_attention
from evals.throughput.op_rows import errors
from pretrain.ops.window_attention import window_attention_naive

pytestmark = pytest.mark.gpu


def test_torchs_flash_attention_has_the_window_of_flash_attn() -> None:
    q, k, v = (
        torch.randn(2, 300, 2, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    found = errors(
        lambda *x: window_flash_attention(*x, causal=True, window_size=(63, 0)),
        lambda *x: window_attention_naive(*x, block_size=64, reach="window"),
        [q, k, v],
    )
    assert max(found) < 2e-2  # bf16


def test_a_call_that_cannot_be_captured_is_timed_in_the_queue() -> None:
    x, device = torch.randn(1024, 1024, device="cuda"), torch.device("cuda")
    assert device_time(lambda: x @ x, device).method == "graph"
    assert device_time(lambda: (x @ x).sum().item(), device).method == "queue"
    assert device_time(lambda: x @ x, device).method == "graph"
