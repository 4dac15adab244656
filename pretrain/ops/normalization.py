"""Root-mean-square norm, and L2 norm plus rotary position of attention heads.

Shapes: B batch, T time, D width, H heads, K head width.

Both are written with their derivatives: composed from elementary operations they would cost more
memory passes than the matmuls beside them, and eager training feels every pass. A compiler fuses
the elementary operations by itself, and must be given those: from these autograd functions dynamo
made wrong gradients (torch 2.11 on a GPU, even with `backend="eager"`; right in 2.13 on a CPU).

Rotary positions (Su et al. 2021, 2104.09864; half-split layout): scores depend on differences of
positions only, so callers count from the start of what they hold and never from the start of a
stream. Angles are formed in fp64 all the same: in fp32 an angle at 2^20 is off by 0.04 rad, which
would show up as a false loss at long context.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.numerics import matmul_dtype, no_autocast, wide_dtype

# Below any norm that a trained head has; only keeps an all-zero vector at zero.
TINY = 1e-12


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """weight * x / rms(x) over the last axis, computed in at least fp32.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.

    Returns:
        Like `x`, in the dtype in which a matmul would take it: under autocast that saves each
        consumer its own cast.
    """
    if torch.compiler.is_compiling():
        return rms_norm_naive(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps, matmul_dtype(x))


def rms_norm_naive(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition. Signature of `rms_norm`."""
    with no_autocast(x):
        wide = x.to(wide_dtype(x))
        y = F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps)
    return y.to(matmul_dtype(x))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype):
        with no_autocast(x):
            wide = x.to(wide_dtype(x))
            mean_square = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).unsqueeze(-1)
            scale = mean_square.add_(eps).rsqrt_()
            y = (wide * scale).mul_(weight.to(wide.dtype)).to(dtype)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        x, weight, scale = ctx.saved_tensors
        with no_autocast(x):
            wide, d = x.to(scale.dtype), d_y.to(scale.dtype)
            normed = wide * scale
            d_weight = (d * normed).flatten(0, -2).sum(0)
            d = d * weight.to(scale.dtype)
            along = torch.linalg.vecdot(d, normed).div_(x.shape[-1]).unsqueeze(-1)
            d_x = d.addcmul_(normed, along, value=-1).mul_(scale)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None, None


def prepare_heads(
    x: Tensor,
    *,
    scale: Tensor | None = None,
    normalize: bool = False,
    start: int | None = None,
    base: float = 10_000.0,
) -> Tensor:
    """Queries or keys as the scores need them: L2-normalised, scaled, rotated.

    Args:
        x: (B, T, H, K).
        scale: (H,), multiplied onto the normalised heads; None: 1.
        normalize: divide every head by its L2 norm.
        start: position of the first token, for rotary positions; None: no rotation.
        base: of the rotary wavelengths.

    Returns:
        Like `x`; computed in at least fp32.
    """
    if torch.compiler.is_compiling():
        return prepare_heads_naive(x, scale=scale, normalize=normalize, start=start, base=base)
    cos, sin = _rotation(x, start, base)
    if not normalize:
        return _Rotate.apply(x, cos, sin) if cos is not None else x
    if scale is None:
        scale = x.new_ones(x.shape[2], dtype=wide_dtype(x))
    return _NormalizeRotate.apply(x, scale, cos, sin)


def prepare_heads_naive(
    x: Tensor,
    *,
    scale: Tensor | None = None,
    normalize: bool = False,
    start: int | None = None,
    base: float = 10_000.0,
) -> Tensor:
    """The definition. Signature of `prepare_heads`."""
    cos, sin = _rotation(x, start, base)
    with no_autocast(x):
        y = x.to(wide_dtype(x))
        if normalize:
            y = F.normalize(y, dim=-1, eps=TINY)
            y = y if scale is None else y * scale.to(y.dtype).unsqueeze(-1)
        if cos is not None and sin is not None:
            first, second = y.chunk(2, -1)
            y = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return y.to(x.dtype)


def _rotation(x: Tensor, start: int | None, base: float) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin of the rotary angles, (T, 1, K / 2)."""
    if start is None:
        return None, None
    return rotary_table(start, x.shape[1], x.shape[3], base, wide_dtype(x), x.device)


@torch.library.custom_op("longspan::rotary_table", mutates_args=())
def rotary_table(
    start: int, length: int, width: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, 1, width / 2) each. An operator, because inductor would form every
    angle anew for each of B H heads: a third of a training step, in fp64."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, base**-exponents).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@rotary_table.register_fake
def _(
    start: int, length: int, width: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    cos = torch.empty(length, 1, width // 2, dtype=dtype, device=device)
    return cos, torch.empty_like(cos)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Rotates by the angles (direction 1) or back (-1) in two memory passes."""
    first, second = x.chunk(2, -1)
    y = x * torch.cat([cos, cos], -1)
    y_first, y_second = y.chunk(2, -1)
    y_first.addcmul_(second, sin, value=-direction)
    y_second.addcmul_(first, sin, value=direction)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        with no_autocast(x):
            return _turn(x.to(cos.dtype), cos, sin, 1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        cos, sin = ctx.saved_tensors
        with no_autocast(d_y):
            return _turn(d_y.to(cos.dtype), cos, sin, -1).to(d_y.dtype), None, None


class _NormalizeRotate(torch.autograd.Function):
    """y = R(x) scale / |x|: the rotation keeps the norm, so it may come first."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, cos: Tensor | None, sin: Tensor | None):
        with no_autocast(x):
            wide = x.to(wide_dtype(x))
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_(min=TINY)
            factor = scale.to(wide.dtype).unsqueeze(-1) / norm
            if cos is None or sin is None:
                y = wide * factor
            else:
                y = _turn(wide, cos, sin, 1).mul_(factor)
        ctx.save_for_backward(x, scale, norm, cos, sin)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        x, scale, norm, cos, sin = ctx.saved_tensors
        with no_autocast(x):
            wide, d = x.to(norm.dtype), d_y.to(norm.dtype)
            d = d.clone() if cos is None else _turn(d, cos, sin, -1)
            along = torch.linalg.vecdot(wide, d).unsqueeze(-1) / norm
            d_scale = along.flatten(0, 1).sum((0, 2))
            d.addcmul_(wide, along / norm, value=-1)
            d.mul_(scale.to(norm.dtype).unsqueeze(-1) / norm)
        return d.to(x.dtype), d_scale.to(scale.dtype), None, None
