"""What a SwiGLU MLP ends with: W (silu(gate) * up), both halves of one projection.

Shapes: F hidden width, D model width.

On a GPU one operator, for two things that autograd and inductor do not do. The gradients of the
halves are written as the halves of one tensor, which is what the projection's backward multiplies
by. And silu(gate) * up, of which the gradient of W is a product, is formed again in the pass that
forms the gradients and reads all it takes: F of the 3 F numbers that would be kept per token are
not, for F more that are written in that pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """W (silu(gate) * up).

    Args:
        gate_up: (..., 2F), the gate in front.
        weight: (D, F).

    Returns:
        (..., D) like `gate_up`; a GPU computes silu(gate) * up in at least fp32.
    """
    if gate_up.is_cuda:
        return fused_swiglu_linear(gate_up, weight.to(gate_up.dtype))
    return swiglu_linear_naive(gate_up, weight)


def swiglu_linear_naive(gate_up: Tensor, weight: Tensor) -> Tensor:
    """The definition, and on a CPU the faster form. Signature of `swiglu_linear`."""
    gate, up = gate_up.chunk(2, -1)
    return F.linear(F.silu(gate) * up, weight)


@torch.library.custom_op("longspan::swiglu_linear", mutates_args=(), device_types="cuda")
def fused_swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """Signature of `swiglu_linear`, both of one dtype."""
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
