"""The state-space kernels in Triton's interpreter, on a CPU, against definitions in fp64.

The interpreter runs a kernel's arithmetic and masks, but neither its compilation nor its threads.
"""

import os

import pytest
import torch
from torch import Tensor

from pretrain.ops.chunk_scan import scan_into
from pretrain.ops.nplr_ssm import _scan as dense_scan

pytestmark = pytest.mark.triton

# Sums of some hundred terms; narrow types round what is written.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _seeded_and_interpreted() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
    torch.manual_seed(0)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: float) -> None:
    found = {
        name: ((got[name].double() - b).norm() / b.norm().clamp(min=1e-3)).item()
        for name, b in want.items()
    }
    assert all(error <= bound for error in found.values()), str(found)  # NaN fails


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("paired", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize(
    ("batch", "chunks", "modes"), [(3, 7, 16), (1, 35, 3), (3, 1, 1), (2, 3, 64)]
)
def test_the_scan_and_its_adjoint(
    batch: int,
    chunks: int,
    modes: int,
    paired: bool,
    flags: bool,
    reverse: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pretrain.ops import scan_kernels

    monkeypatch.setattr(scan_kernels, "STEPS", 4)
    d, size, wide = 2, 5, torch.promote_types(dtype, torch.float32)
    number, words = (2,) if paired else (), (2 if paired else 1) * modes
    decay = 1.4 * torch.rand(d, modes, *number, dtype=wide) - 0.7
    local = torch.randn(d, batch * chunks, words, dtype=wide)
    s = torch.randn(d, batch, modes, *number, dtype=wide)
    keep = torch.rand(batch, chunks) > 0.4 if flags else None
    rows = torch.zeros(d, batch * chunks, size + words, dtype=dtype)
    before, want = rows[:, :, size:], torch.zeros_like(local, dtype=torch.float64)
    got_last = scan_kernels.scan_chunks(local, decay, s, keep, before, reverse=reverse)
    want_last = scan_into(local.double(), decay.double(), s.double(), keep, want, reverse=reverse)
    assert_close(
        {"before": before, "last": got_last}, {"before": want, "last": want_last}, BOUNDS[dtype]
    )
    assert not rows[:, :, :size].any()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("flags", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("batch", "chunks", "width"), [(3, 7, 32), (18, 4, 6), (1, 5, 64), (2, 1, 1)]
)
def test_the_scan_with_a_matrix_and_its_adjoint(
    batch: int, chunks: int, width: int, flags: bool, reverse: bool
) -> None:
    from pretrain.ops.dense_scan_kernel import scan_into

    d = 2
    matrix = torch.randn(d, width, width) / width**0.5
    local, s = torch.randn(d, batch, chunks, width), torch.randn(d, batch, width)
    keep = torch.rand(batch, chunks) > 0.4 if flags else None
    got = torch.full_like(local, torch.nan)
    got_last = scan_into(local, matrix, s, keep, got, reverse=reverse)
    want = dense_scan(*(x.double() for x in (local, matrix, s)), keep, reverse=reverse)
    found = {"before": got, "last": got_last}
    assert_close(found, dict(zip(found, want, strict=True)), BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    ("size", "modes"),
    [(128, 16), (33, 3), (5, 4), (1, 1), (64, 8), (64, 64), (128, 8), (128, 64)],
)
def test_the_matrix_and_its_gradients(size: int, modes: int, dtype: torch.dtype) -> None:
    from pretrain.ops.ssm_operator_kernels import form_matrix, gradients_of_modes

    d, wide = 3, torch.promote_types(dtype, torch.float32)
    decay, angle = -0.1 * torch.rand(d, modes, dtype=wide), 3 * torch.rand(d, modes, dtype=wide)
    given = [decay, angle, *torch.randn(2, d, modes, dtype=wide), torch.randn(d, dtype=wide)]
    matrix, chunk_decay = form_matrix(*given, size, dtype)

    leaves = [part.double().requires_grad_() for part in given]
    z, c = torch.exp(torch.complex(*leaves[:2])), torch.complex(*leaves[2:4])
    steps = torch.arange(size + 1)
    powers = z[:, None] ** steps[:, None]  # (D, C + 1, N)
    response = 2 * c[:, None] * powers
    taps = response.real[:, :size].sum(-1) + leaves[4][:, None] * (steps[:size] == 0)
    back = steps[:size] - steps[:size, None]
    want = {
        "T": torch.where(back >= 0, taps[:, back.clamp(min=0)], 0.0),
        "W_in": torch.view_as_real(powers[:, :size].flip(1)).flatten(2),
        "W_out": torch.view_as_real(response[:, 1:].conj().resolve_conj()).flatten(2).mT,
    }
    got = {
        "T": matrix[:, :size, :size],
        "W_in": matrix[:, :size, size:],
        "W_out": matrix[:, size:, :size],
    }
    assert_close(got, want, BOUNDS[dtype])
    last = torch.view_as_real(powers[:, size])
    assert_close({"z^C": chunk_decay}, {"z^C": last}, BOUNDS[wide])

    # A state times A is its product with z^C, as complex numbers.
    unit = torch.view_as_complex(torch.eye(2 * modes, dtype=torch.float64).unflatten(-1, (-1, 2)))
    a = torch.view_as_real(unit * powers[:, size, None]).flatten(2)
    whole = torch.cat(
        [torch.cat([want["T"], want["W_in"]], 2), torch.cat([want["W_out"], a], 2)], 1
    )
    above = torch.randn(whole.shape, dtype=wide)
    found = gradients_of_modes(above, *given[:4])
    names = ["decay", "angle", "c_re", "c_im", "skip"]
    expected = torch.autograd.grad((whole * above.double()).sum(), leaves)
    got, want = (dict(zip(names, parts, strict=True)) for parts in (found, expected))
    assert_close(got, want, BOUNDS[wide])


@pytest.mark.parametrize(("length", "size", "channels"), [(96, 32, 70), (65, 5, 3), (1, 1, 1)])
def test_the_copy_only_moves(length: int, size: int, channels: int) -> None:
    from pretrain.ops.scan_kernels import transpose_into

    batch = 2
    for source in (
        torch.randn(batch, length, channels),
        torch.randn(channels, batch, length).permute(1, 2, 0),
        torch.randn(()).expand(batch, length, channels),
    ):
        rows = torch.zeros(channels, batch * length // size, size + 4)
        transpose_into(source, rows[:, :, :size])
        want = source.permute(2, 0, 1).reshape(channels, -1, size)
        assert torch.equal(rows[:, :, :size], want)
        assert not rows[:, :, size:].any()
