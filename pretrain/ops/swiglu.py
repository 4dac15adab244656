"""A SwiGLU MLP, W_down (silu(gate) * up) with gate and up from one product, W_gate_up x.

Shapes: F hidden width, D model width.

Of what is between the products the backward is given gate and up alone: silu(gate) * up, of which
the gradient of W_down is a product, is formed again in the pass that forms their gradients and
reads all it takes. F of the 3 F numbers that would be kept per token are not, for F more that are
written in that pass. And gradients of gate and up are written into one tensor, which is what the
first product's backward multiplies by. Autograd and inductor do neither. Forms:

- on a CPU, the definition;
- on a GPU, both passes in Triton between torch's products;
- where `quack_serves`, both passes in the ends of products: no pass of their own.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.swiglu_quack import (
    in_turns,
    linear_swiglu_in_turns,
    quack_serves,
    swiglu_linear_in_turns,
)


class Gated(NamedTuple):
    """What is between the two products.

    gate_up: (..., 2F), the gate in front; where there is a `hidden`, gate and up take turns.
    hidden: (..., F), silu(gate) * up, from a first product that forms it as well.
    """

    gate_up: Tensor
    hidden: Tensor | None = None


def gate_up_linear(x: Tensor, weight: Tensor) -> Gated:
    """W x, the first product.

    Args:
        x: (..., D).
        weight: (2F, D), the gate in front.
    """
    if quack_serves(x, weight):
        rows = x.bfloat16().flatten(0, -2)
        gated = linear_swiglu_in_turns(rows, in_turns(weight).bfloat16())
        return Gated(*(y.unflatten(0, x.shape[:-1]) for y in gated))
    return Gated(F.linear(x, weight))


def swiglu_linear(gated: Gated, weight: Tensor) -> Tensor:
    """W (silu(gate) * up), the second product.

    Args:
        gated: of the first.
        weight: (D, F).

    Returns:
        (..., D) like `gate_up`; a GPU computes silu(gate) * up in at least fp32.
    """
    gate_up, hidden = gated
    if hidden is not None:
        return swiglu_linear_in_turns(gate_up, hidden, weight.to(gate_up.dtype))
    if gate_up.is_cuda:
        return fused_swiglu_linear(gate_up, weight.to(gate_up.dtype))
    return swiglu_linear_naive(gate_up, weight)


def swiglu_linear_naive(gate_up: Tensor, weight: Tensor) -> Tensor:
    """The definition, and on a CPU the faster form."""
    gate, up = gate_up.chunk(2, -1)
    return F.linear(F.silu(gate) * up, weight)


@torch.library.custom_op("longspan::swiglu_linear", mutates_args=(), device_types="cuda")
def fused_swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """Signature of `swiglu_linear_naive`, both of one dtype."""
    from pretrain.ops.swiglu_kernels import swiglu_forward

    return F.linear(swiglu_forward(gate_up.contiguous()), weight)


@torch.library.custom_op("longspan::swiglu_linear_backward", mutates_args=(), device_types="cuda")
def _fused_swiglu_linear_backward(
    dy: Tensor, gate_up: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `gate_up` and `weight`."""
    from pretrain.ops.swiglu_kernels import swiglu_backward

    d_gate_up, hidden = swiglu_backward((dy @ weight).contiguous(), gate_up.contiguous())
    return d_gate_up, dy.flatten(0, -2).T @ hidden.flatten(0, -2)


@fused_swiglu_linear.register_fake
def _(gate_up: Tensor, weight: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], weight.shape[0])


@_fused_swiglu_linear_backward.register_fake
def _(dy: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _fused_swiglu_linear_backward(dy, *ctx.saved_tensors)


fused_swiglu_linear.register_autograd(_backward, setup_context=_save)
