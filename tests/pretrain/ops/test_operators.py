"""Our operators keep torch.library's rules: shapes without data, gradients, no hidden mutation."""

import pytest
import torch
from torch import Tensor

from pretrain.ops.channel_rows import channel_rows, tokens_of_rows
from pretrain.ops.chunk_scan import chunk_scan
from pretrain.ops.flex_window_attention import document_numbers
from pretrain.ops.normalization import rotary_table
from pretrain.ops.nplr_ssm import _dense_scan
from pretrain.ops.ssd import ssd_scan
from pretrain.ops.ssm_chunks import ssm_chunks

D, B, J, C, N = 3, 2, 4, 5, 3


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def cases() -> dict[str, tuple]:
    torch.manual_seed(0)
    state = leaf(B, D, N).transpose(0, 1)  # mixers hand it over batch first
    return {
        "chunk_scan": (chunk_scan, leaf(D, B, J, N, 2), leaf(D, N, 2), leaf(D, B, N, 2)),
        "chunk_scan, real": (chunk_scan, leaf(D, B, J, N), leaf(D, N), state),
        "dense_scan": (_dense_scan, leaf(D, B, J, N), leaf(D, N, N), leaf(D, B, N)),
        "ssm_chunks": (
            ssm_chunks,
            leaf(B, J * C, D),
            leaf(D, C + 2 * N, C + 2 * N),
            leaf(D, B, N, 2),
        ),
        "ssd_scan": (ssd_scan, leaf(B, J, D, N, C), leaf(B, J, D), leaf(B, D, N, C)),
    }


@pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("name", cases())
def test_operators_keep_the_rules_of_torch_library(name: str, flags: bool) -> None:
    operator, *inputs = cases()[name]
    inputs.append(torch.rand(B, J) > 0.5 if flags else None)
    torch.library.opcheck(operator, tuple(inputs))


def test_the_rotary_table_keeps_them_too() -> None:
    torch.library.opcheck(rotary_table, (3, 5, 8, 1e4, torch.float32, torch.device("cpu")))


def test_the_numbers_of_documents_keep_them_too() -> None:
    fresh = torch.tensor([[True, False], [False, True]])
    torch.library.opcheck(document_numbers, (5, 3, 4, 1, fresh))


def test_rows_of_channels_keep_them_too_and_lead_back() -> None:
    u = leaf(B, J * C, D)
    torch.library.opcheck(channel_rows, (u, C))
    rows = channel_rows(u, C)
    assert rows.is_contiguous()
    assert torch.equal(rows[1, 1], u[0, C : 2 * C, 1])  # channel 1, second chunk of the first lane
    assert torch.equal(tokens_of_rows(rows, B), u)
    torch.autograd.gradcheck(lambda u: tokens_of_rows(channel_rows(u, C).square(), B), u)
