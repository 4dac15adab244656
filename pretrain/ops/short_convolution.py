"""silu of a short causal convolution per channel that continues a stream.

    y_t = silu(bias + sum_k weight_k x_{t - (K - 1) + k})

Shapes: B batch, T time, D channels, K taps.

Tokens before the start of a document are zeros. Forms: on a CPU K shifted products in place of a
convolution kernel, since K is 4, and a sum of that many terms in a fixed order is causal to the
last bit; on a GPU the same sum in Triton, of which the backward is given the inputs alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.numerics import no_autocast, wide_dtype


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: Tensor | None = None,
    *,
    resets: Tensor | None = None,
    edges: range = range(0),
) -> tuple[Tensor, Tensor]:
    """Convolves x (B, T, D).

    Args:
        x: the inputs.
        weight: (D, K), the last tap is the present token's.
        bias: (D,).
        state: (B, K - 1, D), the inputs before this call, zeros before the document; None: zeros.
        resets: (B, n) bool, True where a document begins at that edge.
        edges: the n token offsets of `resets`.

    Returns:
        y like `x`, and the state after the last token.
    """
    batch, length, channels = x.shape
    taps = weight.shape[1]
    if state is None:
        state = x.new_zeros(batch, taps - 1, channels)
    starts = _document_starts(resets, edges, length)
    front = state.to(x.dtype)
    if x.is_cuda:
        with no_autocast(x):
            wide = wide_dtype(x)
            y = fused_short_convolution(x, front, weight.to(wide), bias.to(wide), starts)
    else:
        y = short_convolution_naive(x, front, weight.to(x.dtype), bias.to(x.dtype), starts)
    recent = x[:, max(0, length - taps + 1) :]
    # Not a view, which would keep all inputs alive.
    after = torch.cat([front[:, recent.shape[1] :], recent], 1)
    if starts is not None:
        kept = torch.arange(length - taps + 1, length, device=x.device) >= starts[:, -1:]
        after = after * kept.unsqueeze(-1)
    return y, after


def short_convolution_naive(
    x: Tensor, front: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None
) -> Tensor:
    """The definition, and on a CPU the faster form. Signature of `fused_short_convolution`."""
    length, taps = x.shape[1], weight.shape[1]
    stream, y = torch.cat([front, x], 1), bias
    token = torch.arange(length, device=x.device)
    for lag in range(taps):
        first = taps - 1 - lag
        seen = stream[:, first : first + length]
        if starts is not None and lag > 0:
            seen = seen * (token - lag >= starts).unsqueeze(-1)
        y = y + seen * weight[:, first]
    return F.silu(y)


_LONG_AGO = -(2**40)

# They take any strides: inductor pads rows that eager code does not, and would copy x otherwise.
_TAGS = (torch.Tag.flexible_layout,)


@torch.library.custom_op("longspan::short_convolution", mutates_args=(), tags=_TAGS)
def fused_short_convolution(
    x: Tensor, front: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None
) -> Tensor:
    """On a GPU.

    Args:
        x: (B, T, D), channels contiguous.
        front: (B, K - 1, D) like `x`, the inputs before it.
        weight: (D, K) in at least fp32.
        bias: (D,) like `weight`.
        starts: (B, T) int64, where in this call each token's document begins; None: before it.

    Returns:
        (B, T, D) contiguous, like `x`.
    """
    from pretrain.ops.short_convolution_kernels import convolve

    given = x if x.stride(2) == 1 else x.contiguous()
    front, weight, bias = (part.contiguous() for part in (front, weight, bias))
    return convolve(given, front, weight, bias, None if starts is None else starts.contiguous())


@torch.library.custom_op("longspan::short_convolution_backward", mutates_args=(), tags=_TAGS)
def _fused_short_convolution_backward(
    dy: Tensor, x: Tensor, front: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, front, weight and bias."""
    from pretrain.ops.short_convolution_kernels import convolve_backward

    given = x if x.stride(2) == 1 else x.contiguous()
    front, weight, bias = (part.contiguous() for part in (front, weight, bias))
    starts = None if starts is None else starts.contiguous()
    return convolve_backward(dy.contiguous(), given, front, weight, bias, starts)


@fused_short_convolution.register_fake
def _(x: Tensor, front: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_fused_short_convolution_backward.register_fake
def _(
    dy: Tensor, x: Tensor, front: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, d_front, d_weight, d_bias = (p.new_empty(p.shape) for p in (x, front, weight, bias))
    return dx, d_front, d_weight, d_bias


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_fused_short_convolution_backward(dy, *ctx.saved_tensors), None


fused_short_convolution.register_autograd(_backward, setup_context=_save)


def _document_starts(resets: Tensor | None, edges: range, length: int) -> Tensor | None:
    """(B, T) offset at which each token's document begins, far in the past for the first one."""
    if resets is None:
        return None
    # Along edges, of which there are few: along tokens a scan would take longer than the rest.
    offsets = torch.arange(edges.start, edges.stop, edges.step, device=resets.device)
    begun = F.pad(torch.where(resets, offsets, _LONG_AGO), (1, 0), value=_LONG_AGO).cummax(1).values
    passed = (torch.arange(length, device=resets.device) - edges.start) // edges.step + 1
    return begun[:, passed]
