"""Compiled blocks, and how far they are from themselves uncompiled."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.training.compiled_products import QuackProducts
from pretrain.training.loop_barriers import add_loop_barriers

# bf16 keeps 8 bits and a compiled block rounds in other places: 0.01 of what a block adds.
COMPILED_ERROR, TINY = 0.05, 1e-12
SHARE = 1e-3  # of all gradients: smaller ones, as of a bias that softmax ignores, are noise


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles each block, and the norm behind the last one, in place. That between an encoder and
    its decoder, `encoder_norm`, stays eager.

    All blocks share the code of `Block.forward`, and with it the number of variants that torch
    compiles before it runs the rest eagerly for good: eight, but each kind of layer has one without
    a state and one with, in training and in evaluation, where the last segment is shorter. Shapes
    are static, as in the tests of the mixers: training has one.
    """
    torch._dynamo.config.recompile_limit = 64
    add_loop_barriers()
    options = {"post_grad_custom_post_pass": QuackProducts()} if backend == "inductor" else None
    for module in (*model.blocks, model.norm):  # type: ignore[misc]
        module.compile(backend=backend, dynamic=False, options=options)


def compiled_error(
    block: nn.Module,
    inputs: Sequence[Tensor],
    want: Tensor,
    got: Tensor,
    *,
    memory: Tensor | None = None,
    each: bool = False,
) -> float:
    """The relative difference of what a block adds to the sum of its inputs, or of its derivatives
    if that is larger.

    Inductor of torch 2.11 was seen to compute something else on an H200, in silence: relative
    errors of 0.16 to 0.25 for blocks that were right on a CPU with torch 2.13.

    Args:
        block: has the parameters.
        inputs: what it was given, with gradients, all of one shape.
        want: what it made uncompiled, of the same shape.
        got: what it made compiled.
        memory: what it read besides, with gradients, of any shape.
        each: compare each parameter's gradient by itself, as fp32 allows: inductor of torch 2.11
            was seen to make a single one wrong, 1 % of all. In bf16 single ones cancel, and all
            are compared as one.
    """
    read = [] if memory is None else [memory]
    wanted, found = (_gradients(block, [*inputs, *read], y) for y in (want, got))
    below = [
        [torch.cat([gradients.pop() for _ in given]) for gradients in (wanted, found)]
        for given in (read, inputs)  # the last ones first
        if given
    ]
    total = torch.cat(wanted)
    pairs = list(zip(wanted, found, strict=True)) if each else [(total, torch.cat(found))]
    least = SHARE * total.norm().item()
    errors = [((b - a).norm() / a.norm().clamp(min=max(least, TINY))).item() for a, b in pairs]
    errors += [((b - a).norm() / a.norm().clamp(min=TINY)).item() for a, b in below]
    # What the block adds, not the residual stream it is added to.
    errors.append(((got - want).norm() / (want - sum(inputs)).norm().clamp(min=TINY)).item())
    return torch.tensor(errors).max().item()  # NaN if one is; Python's max would pass over it


def _gradients(block: nn.Module, inputs: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    """Those of a functional of y by each parameter and then by each input, flat; zeros where one
    has no part. The sum of squares alone would do for no norm: it is what that keeps constant."""
    by = [*(p for p in block.parameters() if p.requires_grad), *inputs]
    channels = torch.linspace(0.5, 1.5, y.shape[-1], device=y.device)
    loss = (channels * y.float().square()).sum()
    found = torch.autograd.grad(loss, by, allow_unused=True, materialize_grads=True)
    return [g.flatten().float() for g in found]
