"""A SwiGLU MLP's products with the gate in their ends, by quack (Dao-AILab/quack; extra `flash`).

Shapes: M tokens, F hidden width, D model width.

A tile of gate and up is turned into silu(gate) * up, and one of its gradient into theirs, while it
is in registers. For that a tile must hold a gate and its up side by side, so that in all of this
file they take turns: gate_0, up_0, gate_1, ... (quack's `concat_layout` reads weights that have the
gate in front, but knows no such activations). Only the first weight, and its gradient, are brought
into that order and back, outside of the operators: a compiler does it in the pass that casts them.

quack 0.6.5 has to lie in a directory called site-packages or dist-packages: in any other it fails
with "no fail-closed semantic key", because it takes CuteDSL's functions for a user's own.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.kernel_packages import aligned, is_installed
from pretrain.ops.numerics import matmul_dtype

QUACK_INSTALLED = is_installed("quack-kernels")

# Below 1,152 some of 132 multiprocessors have no tile of 128 x 192 (F 2,752); cuBLAS has smaller.
ENOUGH_TOKENS = 2048


def quack_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether to take these products for `x` (..., D) and a first weight (2F, D): where quack is
    installed, on Hopper, in bf16 (autocast's, too), with rows in units of 16 bytes, and for no
    fewer than `ENOUGH_TOKENS`. quack can do Blackwell as well, but was not measured there."""
    return (
        QUACK_INSTALLED
        and x.is_cuda
        and matmul_dtype(x) == torch.bfloat16
        and weight.shape[0] % 16 == 0
        and weight.shape[1] % 8 == 0
        and x.numel() >= ENOUGH_TOKENS * weight.shape[1]
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def in_turns(weight: Tensor) -> Tensor:
    """(2F, D), the gate in front -> the same rows, gate and up taking turns."""
    return weight.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


@torch.library.custom_op("longspan::linear_swiglu_in_turns", mutates_args=())
def linear_swiglu_in_turns(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """W x, (M, 2F), and of it, without a gradient, silu(gate) * up, (M, F).

    Args:
        x: (M, D), bf16; of more axes inductor would write a copy for the gradient of the weight.
        weight: (2F, D), bf16.
    """
    from quack.gemm_interface import gemm_gated

    x, weight = _as_quack_reads(x, weight)
    return gemm_gated(x, weight.T, activation="swiglu", tuned=False)


@torch.library.custom_op("longspan::swiglu_linear_in_turns", mutates_args=())
def swiglu_linear_in_turns(gate_up: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """W hidden, (..., D), as a function of `gate_up`.

    Args:
        gate_up: (..., 2F), bf16.
        hidden: (..., F), bf16, silu(gate) * up.
        weight: (D, F), bf16.
    """
    return F.linear(hidden, weight)


@torch.library.custom_op("longspan::swiglu_linear_in_turns_backward", mutates_args=())
def _swiglu_linear_in_turns_backward(
    dy: Tensor, gate_up: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of `gate_up`, (M, 2F), and silu(gate) * up, (M, F); `dy` is (M, D)."""
    from quack.gemm_interface import gemm_dgated

    operands = _as_quack_reads(dy, weight, gate_up)
    return gemm_dgated(*operands, activation="swiglu", tuned=False, config=_narrow_tiles())


def _as_quack_reads(*operands: Tensor) -> list[Tensor]:
    return [aligned(x.contiguous()) for x in operands]


@functools.cache
def _narrow_tiles() -> Any:
    """Of 128 columns where quack's default has 192, which leave the end of a tile few registers:
    3.9 ms less per step of 24 layers (65,536 tokens, D 1,024, F 2,752, one H100).

    One object for all calls, because quack keeps what it has planned by the identity of this.
    """
    from quack.gemm_config import GemmConfig

    return GemmConfig(tile_n=128)


@linear_swiglu_in_turns.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    (rows, _), width = x.shape, weight.shape[0]
    return x.new_empty(rows, width), x.new_empty(rows, width // 2)


@swiglu_linear_in_turns.register_fake
def _(gate_up: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])


@_swiglu_linear_in_turns_backward.register_fake
def _(dy: Tensor, gate_up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), dy.new_empty(dy.shape[0], weight.shape[1])


def _save_first(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for it


def _backward_first(ctx: Any, d_gate_up: Tensor, _: None) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return d_gate_up @ weight, d_gate_up.T @ x


def _save_second(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    gate_up, _, weight = inputs
    ctx.save_for_backward(gate_up, weight)


def _backward_second(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:
    gate_up, weight = ctx.saved_tensors
    dy = dy.flatten(0, -2)
    d_gate_up, hidden = _swiglu_linear_in_turns_backward(dy, gate_up.flatten(0, -2), weight)
    return d_gate_up.view(gate_up.shape), None, dy.T @ hidden


linear_swiglu_in_turns.register_autograd(_backward_first, setup_context=_save_first)
swiglu_linear_in_turns.register_autograd(_backward_second, setup_context=_save_second)
