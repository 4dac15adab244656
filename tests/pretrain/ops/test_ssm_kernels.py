"""On a GPU state-space ops run kernels of their own between their products."""

import pytest
import torch
from torch import Tensor

from pretrain.mixers.s4d import S4D
from pretrain.models.block import Block
from pretrain.ops.chunk_scan import chunk_scan
from pretrain.ops.lti_ssm import SSMParameters, lti_ssm
from pretrain.ops.nplr_ssm import _dense_scan
from tests.pretrain.ops.test_ssd import check_compiled

D, B = 24, 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("chunk_size", "modes", "length"),
    [
        (128, 16, 2500),
        (64, 16, 512),
        (16, 4, 127),
        (5, 8, 127),
        (128, 33, 300),
        (128, 33, 1),
        (64, 64, 200),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    # fp32: d_log_dt, a sum over tokens and modes that cancels, was off by 1.4e-5 on an H100.
    # In bf16 operands, states and the gradients of y and states are rounded.
    [(torch.float64, 1e-10), (torch.float32, 4e-5), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_kernels_equal_the_chunked_form_in_fp64(
    documents: bool, dtype: torch.dtype, bound: float, chunk_size: int, modes: int, length: int
) -> None:
    torch.manual_seed(0)
    leaves = [
        torch.empty(D).uniform_(-7, -2),
        torch.randn(D, modes) * 0.3 - 0.7,
        3.1 * torch.arange(modes).float().expand(D, -1) + 0.1 * torch.randn(D, modes),
        torch.randn(D, modes, 2),
        torch.randn(D),
        torch.randn(B, D, 2, modes),
    ]
    u = torch.randn(B, length, D).to(dtype)
    edges = range(0, length, 2 * chunk_size) if documents else range(0)
    resets = torch.rand(B, len(edges)) < 0.4 if documents else None

    def evaluate(device: str, wide: torch.dtype, narrow: torch.dtype) -> list[torch.Tensor]:
        x = u.to(device, narrow).requires_grad_()
        own = [leaf.to(device, wide).requires_grad_() for leaf in leaves]
        flags = None if resets is None else resets.to(device)
        y, after = lti_ssm(
            x, SSMParameters(*own[:5]), own[5], resets=flags, edges=edges, chunk_size=chunk_size
        )
        weights = [torch.cos(torch.arange(t.numel())).view(t.shape) for t in (y, after)]
        loss = sum(
            (t.double() * w.to(device).double()).sum()
            for t, w in zip((y, after), weights, strict=True)
        )
        found = [y, after, *torch.autograd.grad(loss, [x, *own])]
        return [part.detach().double().cpu() for part in found]

    got = evaluate("cuda", torch.promote_types(dtype, torch.float32), dtype)
    want = evaluate("cpu", torch.float64, torch.float64)
    names = ["y", "state", "d_u", "d_log_dt", "d_log_A_real", "d_A_imag", "d_C", "d_D", "d_state"]
    found = {
        name: ((a - b).norm() / b.norm().clamp(min=1e-3)).item()
        for name, a, b in zip(names, got, want, strict=True)
    }
    assert all(error <= bound for error in found.values()), str(found)  # NaN fails


@pytest.mark.gpu
def test_a_compiled_block_computes_the_same() -> None:
    """In bf16, where a kernel forms the matrix, with a state and resets."""
    torch.manual_seed(0)
    width, length = 256, 300
    mixer = S4D(width, chunk_size=64)
    block = Block("s4d", mixer, d_model=width, d_ff=512, mlp="swiglu").cuda()
    x = torch.randn(2, length, width, device="cuda", requires_grad=True)
    resets = torch.rand(2, 5, device="cuda") < 0.4
    state = mixer.init_state(2, device=x.device, dtype=torch.bfloat16)
    state = state._replace(ssm=torch.randn_like(state.ssm))

    def form(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            out = block(x, state, resets)
        return out.stream, out.state.ssm

    check_compiled(form, "inductor", [x], 2e-2, list(block.parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("kind", ["real", "complex", "matrix"])
@pytest.mark.parametrize(("chunks", "width"), [(1, 16), (37, 32), (32, 64), (5, 3)])
def test_scans_equal_their_loops_in_fp64(
    chunks: int, width: int, kind: str, documents: bool
) -> None:
    torch.manual_seed(0)
    pair = (2,) if kind == "complex" else ()
    if kind == "matrix":
        operator, decay = _dense_scan, torch.randn(D, width, width) / width**0.5 / 2
    else:
        operator, decay = chunk_scan, 1.4 * torch.rand(D, width, *pair) - 0.7
    leaves = [torch.randn(D, B, chunks, width, *pair), decay, torch.randn(D, B, width, *pair)]
    keep = torch.rand(B, chunks) > 0.4 if documents else None
    above = [torch.randn_like(leaves[0]), torch.randn_like(leaves[2])]

    def evaluate(device: str, dtype: torch.dtype) -> list[Tensor]:
        own = [leaf.to(device, dtype).requires_grad_() for leaf in leaves]
        outputs = operator(*own, None if keep is None else keep.to(device))
        gradients = torch.autograd.grad(outputs, own, [g.to(device, dtype) for g in above])
        return [x.detach().double().cpu() for x in (*outputs, *gradients)]

    got, want = evaluate("cuda", torch.float32), evaluate("cpu", torch.float64)
    pairs = zip(got, want, strict=True)
    errors = [((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in pairs]
    assert all(error <= 1e-5 for error in errors), errors  # NaN fails
