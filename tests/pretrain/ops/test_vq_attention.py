"""Linear-time VQ attention equals quadratic attention over quantised keys, gradients included."""

import pytest
import torch
from torch import Tensor

from pretrain.ops.vq_attention import (
    FORGOTTEN,
    VQCache,
    nearest_codes,
    straight_through,
    two_sided_vq_attention,
    vq_attention,
    vq_attention_quadratic,
)

W, BATCH, HEADS, CODES, KEY, VALUE = 8, 2, 2, 5, 4, 6

# fp64 and fp32: order of summation. bf16: scores and weights have 8 bits, errors average out.
BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}

every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
every_length = pytest.mark.parametrize("length", [1, W - 1, 2 * W + 3, 6 * W])
every_offset = pytest.mark.parametrize("offset", [None, 0, 3], ids=lambda o: f"offset {o}")


def problem(length: int, offset: int | None, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, the bias and the cache's means (leaves), the codebook and the cache's counts."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total = length + (0 if offset is None else W + offset)
    wide = torch.promote_types(dtype, torch.float32)
    q, k = draw(BATCH, length, HEADS, KEY), draw(BATCH, total, HEADS, KEY)
    v, bias = draw(BATCH, total, HEADS, VALUE), draw(HEADS, 2 * W)
    counts = torch.randint(0, 3, (BATCH, HEADS, CODES), generator=generator).to(wide)
    means, codebook = draw(BATCH, HEADS, CODES, VALUE), draw(HEADS, CODES, KEY)
    if offset is None:
        counts = torch.zeros_like(counts)
    means = means * (counts > 0).unsqueeze(-1)
    leaves = [q.to(dtype), k.to(dtype), v.to(dtype), bias.to(wide), means.to(wide)]
    return [*(leaf.requires_grad_() for leaf in leaves), codebook.to(wide), counts]


def evaluate(
    form, tensors: list[Tensor], codes: Tensor, offset: int | None, fresh: Tensor | None
) -> list[Tensor]:
    """Output, cache, and the gradients of a fixed functional of both."""
    q, k, v, bias, means, codebook, counts = tensors
    y, cache = form(
        q,
        q * 0.7,  # recent scores have queries of their own: rotated ones, say
        straight_through(k, codes, codebook),
        codes,
        v,
        codebook,
        VQCache(counts, means),
        bias,
        block_size=W,
        offset=offset or 0,
        fresh=fresh,
    )
    held = cache.means * (cache.counts > 0).unsqueeze(-1)  # the mean of nothing is anything
    return [y, *cache, *gradients((y, held), tensors[:5])]


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a fixed functional."""
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    pairs = zip(outputs, factors, strict=True)
    loss = sum((t.double() * factor.to(t.device)).sum() for t, factor in pairs)
    return torch.autograd.grad(loss, leaves)


def assert_close(got: list[Tensor], want: list[Tensor], values: int, dtype: torch.dtype) -> None:
    """The first `values` are no gradients."""
    got, want = ([t.double().cpu() for t in x] for x in (got, want))
    if dtype == torch.bfloat16:
        # Gradients are judged together: a single one may be a sum of few terms that cancel.
        got, want = (
            [*x[:values], torch.cat([g.flatten() for g in x[values:]])] for x in (got, want)
        )
    for a, b in zip(got, want, strict=True):
        error = (a - b).norm() / b.norm().clamp(min=1e-30)
        # A lone key has weight 1 and its scores no gradient at all.
        assert error < BOUNDS[dtype] or (a - b).abs().max() < 1e-2 * BOUNDS[dtype]


def check_linear_form(length: int, offset: int | None, dtype: torch.dtype, device: str) -> None:
    """Against the quadratic one in fp64 on a CPU, which chooses the codes."""
    tensors = problem(length, offset, dtype)
    codes = nearest_codes(tensors[1], tensors[5])
    if offset is not None:
        codes[0, 2, 1] = FORGOTTEN
    blocks = -(-((offset or 0) + length) // W)
    flags = torch.rand(BATCH, blocks, generator=torch.Generator().manual_seed(3)) < 0.3
    for fresh in [None, flags] if offset is None else [flags, flags[:, :1] & False, flags[:, :1]]:
        given = [t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors]
        there = None if fresh is None else fresh.to(device)
        got = evaluate(vq_attention, given, codes.to(device), offset, there)
        wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
        want = evaluate(vq_attention_quadratic, wide, codes, offset, fresh)
        assert torch.equal(got[1].double().cpu(), want[1])  # counts
        assert_close(got, want, 3, dtype)


@every_dtype
@every_length
@every_offset
def test_linear_form_equals_the_quadratic_one(
    length: int, offset: int | None, dtype: torch.dtype
) -> None:
    check_linear_form(length, offset, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_length
@every_offset
def test_on_a_gpu_it_equals_the_quadratic_form(
    length: int, offset: int | None, dtype: torch.dtype
) -> None:
    check_linear_form(length, offset, dtype, "cuda")


def two_sided_quadratic(
    q: Tensor,
    local_q: Tensor,
    local_k: Tensor,
    codes: Tensor,
    v: Tensor,
    codebook: Tensor,
    bias: Tensor,
    *,
    block_size: int,
) -> Tensor:
    """One dense softmax over all keys, each by itself."""
    time = torch.arange(q.shape[1])
    blocks = time // block_size
    # The bias begins with distance 1 - 2W; what lies outside of it is not near.
    place = (time[:, None] - time + 2 * block_size - 1).clamp(0, 4 * block_size - 2)
    near = torch.einsum("bthk,bshk->bhts", local_q, local_k) + bias[:, place]
    far = torch.einsum("bthk,bshk->bhts", q, codebook[torch.arange(HEADS), codes.clamp(min=0)])
    scores = torch.where((blocks[:, None] - blocks).abs() <= 1, near, far)
    hidden = (codes == FORGOTTEN).transpose(1, 2).unsqueeze(2)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v)


@every_dtype
@pytest.mark.parametrize("length", [W - 1, 2 * W + 3, 6 * W])
def test_two_sided_form_equals_the_quadratic_one(length: int, dtype: torch.dtype) -> None:
    tensors = problem(length, None, dtype)
    codes = nearest_codes(tensors[1], tensors[5])
    codes[0, 2, 1] = codes[1, -3:] = FORGOTTEN
    results = []
    for form, kind in ((two_sided_vq_attention, dtype), (two_sided_quadratic, torch.float64)):
        wide = torch.promote_types(kind, torch.float32)
        given = [t.detach().to(wide if i > 2 else kind) for i, t in enumerate(tensors)]
        q, k, v, bias, *_ = leaves = [t.requires_grad_() for t in given[:4]]
        both = torch.cat([2 * bias.flip(1), bias[:, 1:]], 1)  # keys ahead have a bias of their own
        local_k, book = straight_through(k, codes, given[5]), given[5]
        y = form(q, q * 0.7, local_k, codes, v, book, both, block_size=W)
        results.append([y, *gradients((y,), leaves)])
    assert results[0][0].dtype == dtype
    assert_close(*results, 1, dtype)


def test_gradient_reaches_keys_inside_the_exact_zone_only() -> None:
    """The last block's outputs move the keys of two blocks; older ones are constants."""
    tensors = problem(4 * W, None, torch.float64)
    codes = nearest_codes(tensors[1], tensors[5])
    for form in (vq_attention, vq_attention_quadratic):
        q, k, v, bias, means, codebook, counts = tensors
        local_k = straight_through(k, codes, codebook)
        cache = VQCache(counts, means)
        y, _ = form(q, q, local_k, codes, v, codebook, cache, bias, block_size=W)
        gradient, values = torch.autograd.grad(y[:, -1].square().sum(), [k, v])
        moved = gradient.abs().amax((0, 2, 3)) > 0
        assert moved.tolist() == [False] * 2 * W + [True] * 2 * W
        assert (values.abs().amax((0, 2, 3)) > 0).all()


def test_without_the_logarithm_of_counts_the_forms_would_differ() -> None:
    """What the identity rests on is exercised: some code holds several old keys."""
    tensors = problem(6 * W, None, torch.float64)
    codes = nearest_codes(tensors[1], tensors[5])
    _, cache = evaluate(vq_attention, tensors, codes, None, None)[0:2]
    assert cache.max() > 2


def test_codes_are_the_nearest_ones() -> None:
    _, k, *_, codebook, _ = problem(50, None, torch.float64)
    distance = (k.unsqueeze(3) - codebook).norm(dim=-1)
    assert torch.equal(nearest_codes(k, codebook), distance.argmin(-1))


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3])
def test_crowded_keys_get_their_nearest_code_in_fp32_too(spread: float) -> None:
    """Trained keys lie as near to each other as 1e-2 of their length; from the origin, in fp32, 1 %
    of the choices would be others at that spread, and half of them at a tenth of it."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.nn.functional.normalize(torch.randn(HEADS, 64, generator=generator), dim=-1)
    k = middle + spread * torch.randn(1, 2000, HEADS, 64, generator=generator) / 8
    codebook = middle.unsqueeze(1) + spread * torch.randn(HEADS, 32, 64, generator=generator) / 8
    exact = nearest_codes(k.double(), codebook.double())
    assert torch.equal(nearest_codes(k, codebook), exact)


def test_nothing_is_quadratic_in_time() -> None:
    """The largest tensor of a call grows linearly."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    sizes = []
    for blocks in (8, 16, 32):
        tensors = [t.detach() for t in problem(blocks * W, None, torch.float32)]
        q, k, v, bias, means, codebook, counts = tensors
        codes = nearest_codes(k, codebook)
        with Largest() as largest:
            vq_attention(q, q, k, codes, v, codebook, VQCache(counts, means), bias, block_size=W)
        sizes.append(largest.numel)
    assert sizes[2] < 2.2 * sizes[1] < 4.84 * sizes[0]
