"""The chunked loss equals F.cross_entropy and never holds the logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pretrain.ops.cross_entropy import (
    add_product_,
    linear_cross_entropy,
    linear_cross_entropy_naive,
)

TOKENS, WIDTH, VOCABULARY = 37, 8, 29
every_dtype = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    mask = torch.rand(TOKENS, generator=generator) < 0.7
    return hidden, weight, targets, mask


@pytest.mark.parametrize("chunk_size", [1, 16, 37, 4096])
@every_dtype
def test_values_and_gradients_equal_torchs_own(
    chunk_size: int, dtype: torch.dtype, bound: float
) -> None:
    hidden, weight, targets, mask = problem(dtype)
    loss, nll = linear_cross_entropy(hidden, weight, targets, mask, chunk_size=chunk_size)
    got = [loss, nll, *torch.autograd.grad(3 * loss, [hidden, weight])]
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    want_nll = F.cross_entropy(h @ w.T, targets, reduction="none") * mask
    want = [want_nll.sum(), want_nll, *torch.autograd.grad(3 * want_nll.sum(), [h, w])]
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < bound * b.norm()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(nll[~mask], torch.zeros_like(nll[~mask]))


def test_fp16_is_refused() -> None:
    with pytest.raises(ValueError, match="use bfloat16"):
        linear_cross_entropy(*problem(torch.float16))


@pytest.mark.triton
@pytest.mark.parametrize("vocabulary", [1, 29, 8_192, 20_000])  # one block of logits, or several
@pytest.mark.parametrize("size", [1.0, 300.0])
@every_dtype
def test_the_interpreted_kernel_equals_the_definition(
    dtype: torch.dtype, bound: float, size: float, vocabulary: int
) -> None:
    from pretrain.ops.cross_entropy_kernel import softmax_residual_

    torch.manual_seed(0)
    logits = (size * torch.randn(5, vocabulary + 3)).to(dtype)[:, :vocabulary]  # rows lie apart
    targets = torch.randint(0, vocabulary, (5, 2))[:, 0]  # so do these
    mask = torch.tensor([True, True, False, True, True])
    want = logits.detach().double().requires_grad_()
    want_nll = F.cross_entropy(want, targets, reduction="none") * mask
    (gradient,) = torch.autograd.grad(want_nll.sum(), want)
    nll = torch.empty(5, dtype=torch.promote_types(dtype, torch.float32))
    factor = softmax_residual_(logits, targets, mask, nll)
    for found, right in ((nll, want_nll), (factor[:, None] * logits.double(), gradient)):
        assert (found.double() - right).norm() <= bound * right.norm()


@pytest.fixture
def by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of torch's operations, as on a GPU."""
    from pretrain.ops.cross_entropy_kernel import softmax_residual_

    monkeypatch.setattr(
        "pretrain.ops.cross_entropy._softmax_residual_",
        lambda logits, targets, mask, nll, _: softmax_residual_(logits, targets, mask, nll)[
            :, None
        ],
    )


@pytest.mark.triton
@pytest.mark.usefixtures("by_the_kernel")
def test_the_interpreted_operator_keeps_the_rules_of_torch_library() -> None:
    from pretrain.ops.cross_entropy_kernel import softmax_residual_

    given = torch.randn(3, 7), torch.tensor([0, 6, 2]), torch.tensor([True, False, True])
    torch.library.opcheck(softmax_residual_, (*given, torch.empty(3)))


def test_the_operator_keeps_the_rules_of_torch_library() -> None:
    torch.library.opcheck(add_product_, (torch.zeros(3, 5), torch.randn(3, 4), torch.randn(5, 4).T))


def check_compiled(dtype: torch.dtype, backend: str, device: str, bound: float) -> None:
    """In one graph, chunks of two sizes, values and gradients."""
    torch._dynamo.reset()
    hidden, weight, targets, mask = (x.detach().to(device) for x in problem(dtype))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False, backend=backend)
    results = []
    for form in (linear_cross_entropy, compiled):
        loss, nll = form(*leaves, targets, mask, chunk_size=16)
        results.append([loss, nll, *torch.autograd.grad(3 * loss, leaves)])
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= bound * want.norm()


@every_dtype
def test_traced_it_computes_the_same(dtype: torch.dtype, bound: float) -> None:
    check_compiled(dtype, "aot_eager", "cpu", bound)


@pytest.mark.triton
@pytest.mark.usefixtures("by_the_kernel")
@every_dtype
def test_traced_with_the_kernel_it_computes_the_same(dtype: torch.dtype, bound: float) -> None:
    check_compiled(dtype, "aot_eager", "cpu", bound)


@pytest.mark.gpu
@every_dtype
def test_compiled_on_a_gpu_it_computes_the_same(dtype: torch.dtype, bound: float) -> None:
    check_compiled(dtype, "inductor", "cuda", bound)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [29, 20_000, 32_768, 50_257])
@every_dtype
def test_the_kernel_equals_the_definition(
    dtype: torch.dtype, bound: float, vocabulary: int
) -> None:
    torch.manual_seed(0)
    # Logits of order 1, as models begin: those of order 30 are rounded by a tenth in bf16.
    hidden = (torch.randn(TOKENS, 64, dtype=dtype, device="cuda") / 8).requires_grad_()
    weight = torch.randn(vocabulary, 64, dtype=dtype, device="cuda").requires_grad_()
    targets = torch.randint(0, vocabulary, (TOKENS,), device="cuda")
    mask = torch.rand(TOKENS, device="cuda") < 0.7
    loss, nll = linear_cross_entropy(hidden, weight, targets, mask, chunk_size=16)
    got = [loss, nll, *torch.autograd.grad(loss, [hidden, weight])]
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    want_loss, want_nll = linear_cross_entropy_naive(h, w, targets, mask)
    want = [want_loss, want_nll, *torch.autograd.grad(want_loss, [h, w])]
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() < bound * b.norm()


def test_naive_twin_agrees() -> None:
    arguments = problem(torch.float64)
    for a, b in zip(
        linear_cross_entropy(*arguments, chunk_size=8),
        linear_cross_entropy_naive(*arguments),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_certain_and_hopeless_tokens_stay_finite() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss, nll = linear_cross_entropy(
        hidden, weight, torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool)
    )
    assert nll.tolist() == [0.0, 2e4]
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_logits_of_all_tokens_never_exist() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    hidden, weight, targets, mask = problem(torch.float32)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, mask, chunk_size=5).loss_sum.backward()
    assert largest.numel <= max(5 * VOCABULARY, TOKENS * WIDTH)


def test_buffers_of_one_call_are_not_those_of_the_next() -> None:
    """Two forwards before one backward, in another order, and a second backward of the same."""
    first, second = problem(torch.float32), problem(torch.float32)
    second[0].data.mul_(-2)
    wanted = [
        torch.autograd.grad(linear_cross_entropy(*p, chunk_size=16).loss_sum, p[:2])
        for p in (first, second)
    ]
    losses = [linear_cross_entropy(*p, chunk_size=16) for p in (first, second)]
    values = [loss.nll.clone() for loss in losses]
    for _ in range(2):
        for p, loss, want in reversed(list(zip((first, second), losses, wanted, strict=True))):
            got = torch.autograd.grad(loss.loss_sum, p[:2], retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(loss.nll, nll) for loss, nll in zip(losses, values, strict=True))


def test_recomputation_and_inference_change_no_bit() -> None:
    hidden, weight, targets, mask = problem(torch.float32)
    plain = linear_cross_entropy(hidden, weight, targets, mask, chunk_size=16)
    again = checkpoint(
        linear_cross_entropy, hidden, weight, targets, mask, chunk_size=16, use_reentrant=False
    )
    with torch.inference_mode():
        inferred = linear_cross_entropy(hidden, weight, targets, mask, chunk_size=16)
    want = [*plain, *torch.autograd.grad(plain.loss_sum, [hidden, weight])]
    got = [*again, *torch.autograd.grad(again.loss_sum, [hidden, weight])]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inferred, plain, strict=True))
