"""What lies between the joined projection to q, k, v and attention: norms of heads, and positions.

Shapes: B batch, T time, M cached tokens, P parts (q, k, v, then what the mixer likes), H heads, K
head width.

On a GPU one operator each way. The gradients of all parts are written into one tensor, by which the
projection's backward multiplies; so values, and the last keys that a state holds, have to leave the
projection by the same door, as views. Otherwise autograd adds up tensors of P parts, mostly zeros.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.normalization import prepare_heads, rotary_table
from pretrain.ops.numerics import wide_dtype


class PreparedQKV(NamedTuple):
    """Prepared q (B, T, H, K) and k (B, M + T, H, K); v like k; the other parts of the projection,
    (B, T, H, K) each; the last keys and values as projected, (B, keep, H, K) each, for a state."""

    q: Tensor
    k: Tensor
    v: Tensor
    others: tuple[Tensor, ...]
    kept: tuple[Tensor, Tensor]


def prepare_qkv(
    qkv: Tensor,
    cache: tuple[Tensor, Tensor] | None = None,
    *,
    scale: Tensor | None = None,
    base: float | None = None,
    start: int = 0,
    keep: int = 0,
) -> PreparedQKV:
    """Queries and keys as the scores need them (see `prepare_heads`) out of their projection.

    Args:
        qkv: (B, T, P, H, K).
        cache: keys and values in front of the call's, as projected, (B, M, H, K) each.
        scale: (H,), multiplied onto L2-normalised queries; keys are normalised then, too. None: no
            norms.
        base: of the rotary wavelengths; None: no rotation.
        start: position of the first key, the cache's if there is one.
        keep: how many keys and values a state holds; zeros in front where there are fewer.
    """
    if not qkv.is_cuda or (scale is None and base is None):
        return prepare_qkv_naive(qkv, cache, scale=scale, base=base, start=start, keep=keep)
    return fused_prepare_qkv(qkv, cache, scale=scale, base=base, start=start, keep=keep)


def prepare_qkv_naive(
    qkv: Tensor,
    cache: tuple[Tensor, Tensor] | None = None,
    *,
    scale: Tensor | None = None,
    base: float | None = None,
    start: int = 0,
    keep: int = 0,
) -> PreparedQKV:
    """The definition, part by part, which CPUs use. Signature of `prepare_qkv`."""
    q, k, v, *others = qkv.unbind(2)
    if cache is not None:
        k, v = (torch.cat([a.to(b.dtype), b], 1) for a, b in zip(cache, (k, v), strict=True))
    first_query = start + k.shape[1] - q.shape[1]
    return PreparedQKV(
        _prepared(q, scale, scale is not None, base, first_query),
        _prepared(k, None, scale is not None, base, start),
        v,
        tuple(others),
        (last_tokens(k, keep), last_tokens(v, keep)),
    )


def fused_prepare_qkv(
    qkv: Tensor,
    cache: tuple[Tensor, Tensor] | None = None,
    *,
    scale: Tensor | None = None,
    base: float | None = None,
    start: int = 0,
    keep: int = 0,
) -> PreparedQKV:
    """The GPU's form. Signature of `prepare_qkv`."""
    length, cached = qkv.shape[1], 0 if cache is None else cache[0].shape[1]
    cos = sin = None
    if base is not None:
        width, wide = qkv.shape[4], wide_dtype(qkv)
        cos, sin = rotary_table(start + cached, length, width, base, wide, qkv.device)
    q, k, v, *others, last = _prepare_parts(qkv, scale, cos, sin, min(keep, length))
    kept = last.unbind(2)
    if cache is not None:
        before = tuple(part.to(qkv.dtype) for part in cache)
        k = torch.cat([_prepared(before[0], None, scale is not None, base, start), k], 1)
        v = torch.cat([before[1], v], 1)
        if keep > length:
            kept = tuple(torch.cat(pair, 1) for pair in zip(before, kept, strict=True))
    last_k, last_v = (last_tokens(part, keep) for part in kept)
    return PreparedQKV(q, k, v, tuple(others), (last_k, last_v))


def _prepared(
    x: Tensor, scale: Tensor | None, normalize: bool, base: float | None, start: int
) -> Tensor:
    if base is None:
        return prepare_heads(x, scale=scale, normalize=normalize)
    return prepare_heads(x, scale=scale, normalize=normalize, start=start, base=base)


def last_tokens(x: Tensor, count: int) -> Tensor:
    """The last `count` tokens of x (B, S, H, K), zeros in front where there are fewer.

    In memory of their own: a view would keep all S tokens alive for as long as the state lives.
    Contiguous even where there are none, whose strides a compiler would tell apart.
    """
    missing = max(0, count - x.shape[1])
    kept = x[:, max(0, x.shape[1] - count) :]
    if missing:
        return F.pad(kept, (0, 0, 0, 0, missing, 0))
    return kept.clone(memory_format=torch.contiguous_format)


# An autograd function because an operator may not hand out views, and a copy of the values would
# cost what is gained; as a whole in the graph because Dynamo's own way through autograd functions
# made wrong gradients (see `pretrain.ops.normalization`). Autograd traces it as it does in eager
# mode, down to the two operators below.
@torch.compiler.allow_in_graph
def _prepare_parts(
    qkv: Tensor, scale: Tensor | None, cos: Tensor | None, sin: Tensor | None, last: int
) -> tuple[Tensor, ...]:
    """(B, T, P, H, K) -> prepared q and k, views of all other parts (B, T, H, K), and a view of the
    last keys and values (B, last, 2, H, K)."""
    return _PrepareParts.apply(qkv, scale, cos, sin, last)


class _PrepareParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        scale: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        last: int,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(qkv, scale, cos, sin)
        ctx.set_materialize_grads(False)  # no zeros for a state that nobody keeps
        q, k = prepare_parts(qkv, scale, cos, sin)
        others = (qkv[:, :, part] for part in range(2, qkv.shape[2]))
        return (q, k, *others, qkv[:, qkv.shape[1] - last :, 1:3])

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, ...]:
        qkv, scale, cos, sin = ctx.saved_tensors
        batch, length, parts, *head = qkv.shape
        d_parts = [qkv.new_zeros(batch, length, *head) if d is None else d for d in above[:parts]]
        d_last = qkv.new_empty(batch, 0, 2, *head) if above[parts] is None else above[parts]
        d_qkv, d_scale = prepare_parts_backward(d_parts, d_last, qkv, scale, cos, sin)
        return d_qkv, None if scale is None else d_scale, None, None, None


# Gradients come in the layout that attention's backward writes: the kernels take any.
@torch.library.custom_op(
    "longspan::prepare_parts", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def prepare_parts(
    qkv: Tensor, scale: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q and k (B, T, H, K), contiguous, out of (B, T, P, H, K)."""
    from pretrain.ops.qkv_heads_kernels import prepare_heads_forward

    qkv, normalize = qkv.contiguous(), scale is not None
    q = prepare_heads_forward(qkv, 0, scale, cos, sin, normalize=normalize)
    return q, prepare_heads_forward(qkv, 1, None, cos, sin, normalize=normalize)


@prepare_parts.register_fake
def _(
    qkv: Tensor, scale: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, width = qkv.shape
    q = qkv.new_empty(batch, length, heads, width)
    return q, torch.empty_like(q)


@torch.library.custom_op(
    "longspan::prepare_parts_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def prepare_parts_backward(
    d_parts: Sequence[Tensor],
    d_last: Tensor,
    qkv: Tensor,
    scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the projection, (B, T, P, H, K) contiguous, and of the scales (H,), or (0,).

    From P gradients (B, T, H, K), of prepared q and k and of the other parts, and that of the last
    keys and values (B, n, 2, H, K), where n may be 0.
    """
    from pretrain.ops.qkv_heads_kernels import prepare_heads_backward

    qkv = qkv.contiguous()
    d_qkv, d_scale = torch.empty_like(qkv), qkv.new_empty(0)
    for part, d_y in enumerate(d_parts):
        also = d_last[:, :, part - 1] if part in (1, 2) and d_last.shape[1] else None
        prepared = part < 2
        found = prepare_heads_backward(
            _rows(d_y),
            None if also is None else _rows(also),
            qkv,
            d_qkv,
            part,
            scale if part == 0 else None,
            cos if prepared else None,
            sin if prepared else None,
            normalize=prepared and scale is not None,
        )
        d_scale = d_scale if found is None else found
    return d_qkv, d_scale if scale is None else d_scale.to(scale.dtype)


@prepare_parts_backward.register_fake
def _(
    d_parts: Sequence[Tensor],
    d_last: Tensor,
    qkv: Tensor,
    scale: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    d_qkv = qkv.new_empty(qkv.shape)
    return d_qkv, qkv.new_empty(0) if scale is None else torch.empty_like(scale)


def _rows(x: Tensor) -> Tensor:
    """x, or a copy of it, with heads whose elements are neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()
