"""The gate of a SwiGLU MLP: silu(gate) * up, both halves of one projection.

Shapes: F hidden width.

On a GPU an operator with its own derivative: the gradients of the halves are the halves of one
tensor, which is what the projection's backward multiplies by. Autograd writes them apart and joins
them, and inductor computes each element of the joined tensor both ways and keeps one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: (..., 2F), the gate in front.

    Returns:
        (..., F) like `gate_up`; a GPU computes it in at least fp32.
    """
    return fused_swiglu(gate_up) if gate_up.is_cuda else swiglu_naive(gate_up)


def swiglu_naive(gate_up: Tensor) -> Tensor:
    """The definition, and on a CPU the faster form. Signature of `swiglu`."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@torch.library.custom_op("longspan::swiglu", mutates_args=(), device_types="cuda")
def fused_swiglu(gate_up: Tensor) -> Tensor:
    """Signature of `swiglu`."""
    from pretrain.ops.swiglu_kernels import swiglu_forward

    return swiglu_forward(gate_up.contiguous())


@torch.library.custom_op("longspan::swiglu_backward", mutates_args=(), device_types="cuda")
def _fused_swiglu_backward(d_hidden: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `gate_up`."""
    from pretrain.ops.swiglu_kernels import swiglu_backward

    return swiglu_backward(d_hidden.contiguous(), gate_up.contiguous())


@fused_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_fused_swiglu_backward.register_fake
def _(d_hidden: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, d_hidden: Tensor) -> Tensor:
    return _fused_swiglu_backward(d_hidden, ctx.saved_tensors[0])


fused_swiglu.register_autograd(_backward, setup_context=_save)
