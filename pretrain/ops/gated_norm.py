"""The end of a Mamba-2 layer: W (gain * RMSNorm(y silu(z))), normalised within groups of channels.

Shapes: I inner width, G groups, D model width.

Of what is between y and the product the backward is given y and z alone. What the gradient of W is
a product of is formed again in the pass that forms their gradients: it reads all that this takes.
Forms: on a CPU the definition, on a GPU both passes in Triton around torch's products.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.numerics import no_autocast, wide_dtype


class GatedNorm(NamedTuple):
    """y and z (..., I), gain (I,): the norm that the product behind it forms."""

    y: Tensor
    z: Tensor
    gain: Tensor
    groups: int
    eps: float


def gated_norm_linear(norm: GatedNorm, weight: Tensor) -> Tensor:
    """W gated_norm(y, z).

    Args:
        norm: see `GatedNorm`; computed in at least fp32 and rounded to the dtype of z.
        weight: (D, I).

    Returns:
        (..., D).
    """
    y, z, gain, groups, eps = norm
    if not z.is_cuda:
        return F.linear(gated_norm(norm), weight)
    with no_autocast(z):
        wide = gain.to(wide_dtype(z))
        return fused_gated_norm_linear(y.to(z.dtype), z, wide, weight.to(z.dtype), groups, eps)


def gated_norm(norm: GatedNorm) -> Tensor:
    """The definition: (..., I) in the dtype of z."""
    y, z, gain, groups, eps = norm
    with no_autocast(y):
        wide = wide_dtype(y)
        gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (groups, -1))
        scale = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
        return ((gated * scale).flatten(-2) * gain.to(wide)).to(z.dtype)


@torch.library.custom_op("longspan::gated_norm_linear", mutates_args=())
def fused_gated_norm_linear(
    y: Tensor, z: Tensor, gain: Tensor, weight: Tensor, groups: int, eps: float
) -> Tensor:
    """Signature of `gated_norm_linear`; y, z and weight of one dtype, gain in at least fp32."""
    from pretrain.ops.gated_norm_kernels import gated_norm_forward

    normed = gated_norm_forward(y.contiguous(), z.contiguous(), gain, groups, eps)
    return F.linear(normed, weight)


@torch.library.custom_op("longspan::gated_norm_linear_backward", mutates_args=())
def _fused_gated_norm_linear_backward(
    d_out: Tensor, y: Tensor, z: Tensor, gain: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, z, gain and weight."""
    from pretrain.ops.gated_norm_kernels import gated_norm_backward

    d_normed = (d_out @ weight).contiguous()
    dy, dz, d_gain, normed = gated_norm_backward(
        d_normed, y.contiguous(), z.contiguous(), gain, groups, eps
    )
    return dy, dz, d_gain, d_out.flatten(0, -2).T @ normed.flatten(0, -2)


@fused_gated_norm_linear.register_fake
def _(y: Tensor, z: Tensor, gain: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    return y.new_empty(*y.shape[:-1], weight.shape[0])


@_fused_gated_norm_linear_backward.register_fake
def _(
    d_out: Tensor, y: Tensor, z: Tensor, gain: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, dz, d_gain, d_weight = (x.new_empty(x.shape) for x in (y, z, gain, weight))
    return dy, dz, d_gain, d_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    found = _fused_gated_norm_linear_backward(d_out, *ctx.saved_tensors, ctx.groups, ctx.eps)
    return *found, None, None


fused_gated_norm_linear.register_autograd(_backward, setup_context=_save)
