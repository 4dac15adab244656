"""The gate of a SwiGLU MLP: silu(gate) * up, both halves of one projection.

Shapes: F hidden width.

An operator with its own derivative: the gradients of the halves are the halves of one tensor, which
is what the projection's backward multiplies by. Autograd would write them apart and join them, and
inductor computes each element of the joined tensor both ways and keeps one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("longspan::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: (..., 2F), the gate in front.

    Returns:
        (..., F) like `gate_up`; a GPU computes it in at least fp32.
    """
    gate_up = gate_up.contiguous()
    if gate_up.is_cuda:
        from pretrain.ops.swiglu_kernels import swiglu_forward

        return swiglu_forward(gate_up)
    return swiglu_naive(gate_up)


def swiglu_naive(gate_up: Tensor) -> Tensor:
    """The definition. Signature of `swiglu`."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@torch.library.custom_op("longspan::swiglu_backward", mutates_args=())
def _swiglu_backward(d_hidden: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `gate_up`, contiguous."""
    d_hidden, gate_up = d_hidden.contiguous(), gate_up.contiguous()
    if gate_up.is_cuda:
        from pretrain.ops.swiglu_kernels import swiglu_backward

        return swiglu_backward(d_hidden, gate_up)
    gate, up = gate_up.chunk(2, -1)
    d_gate_up = torch.empty_like(gate_up)
    d_gate, d_up = d_gate_up.chunk(2, -1)
    d_gate.copy_(torch.ops.aten.silu_backward(d_hidden * up, gate))
    torch.mul(d_hidden, F.silu(gate), out=d_up)
    return d_gate_up


@swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_swiglu_backward.register_fake
def _(d_hidden: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, d_hidden: Tensor) -> Tensor:
    return _swiglu_backward(d_hidden, ctx.saved_tensors[0])


swiglu.register_autograd(_backward, setup_context=_save)
