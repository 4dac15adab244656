"""Norms with hand-written derivatives equal their definitions; rotary angles stay exact."""

import pytest
import torch

from pretrain.ops.normalization import (
    prepare_heads,
    prepare_heads_naive,
    rms_norm,
    rms_norm_naive,
)

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Parameters are at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def check(got, want, leaves, wide_leaves, bound: float) -> None:
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    values = [got, *torch.autograd.grad((got.double() * weights).sum(), leaves)]
    wanted = [want, *torch.autograd.grad((want * weights).sum(), wide_leaves)]
    for a, b in zip(values, wanted, strict=True):
        assert (a.double() - b).norm() < bound * b.norm()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rms_norm_equals_its_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 5, 8).to(dtype), torch.randn(8).to(wide_dtype(dtype))]
    leaves = [t.requires_grad_() for t in leaves]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    check(rms_norm(*leaves), rms_norm_naive(*wide), leaves, wide, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("start", [None, 0, 7])
@pytest.mark.parametrize("normalize", ["no", "yes", "scaled"])
def test_prepared_heads_equal_their_definition(
    dtype: torch.dtype, start: int | None, normalize: str
) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(2, 5, 3, 8).to(dtype).requires_grad_()]
    if normalize == "scaled":
        leaves.append(torch.randn(3).to(wide_dtype(dtype)).requires_grad_())
    wide = [t.detach().double().requires_grad_() for t in leaves]
    options = {"start": start, "normalize": normalize != "no"}
    scales = [{"scale": t[1]} if len(t) > 1 else {} for t in (leaves, wide)]
    got = prepare_heads(leaves[0], **options, **scales[0])
    want = prepare_heads_naive(wide[0], **options, **scales[1])
    check(got, want, leaves, wide, BOUNDS[dtype])


def test_rotated_scores_do_not_depend_on_the_offset() -> None:
    """At 2^20 fp32 angles would be off by 0.04 rad."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16, 2, 64).unbind(0)
    scores = [
        torch.einsum("bthk,bshk->bhts", *(prepare_heads(x, start=start) for x in (q, k)))
        for start in (0, 2**20)
    ]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-5 * 64)


def test_compiled_rotation_forms_its_angles_once_and_not_for_every_head() -> None:
    """Inductor would compute them, in fp64, wherever they are used: a third of a training step."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = torch.randn(2, 5, 3, 8)
    rotated = torch.compile(prepare_heads, backend=keep, fullgraph=True)(x, start=7)
    torch.testing.assert_close(rotated, prepare_heads_naive(x, start=7))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert "longspan.rotary_table.default" in targets
    assert not any("cos" in target for target in targets)
