"""FlashAttention-4's functions, as far as our operators call them, in torch for a CPU."""

import sys
from itertools import product

import torch
from torch import Tensor


def visible(queries: int, keys: int, block_size: int) -> Tensor:
    """FlashAttention's window (W - 1, 0), (queries, keys): the last query is level with the last
    key."""
    back = (keys - queries + torch.arange(queries)).unsqueeze(1) - torch.arange(keys)
    return (back >= 0) & (back < block_size)


def runs(starts: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False)]


def sequences(
    rows: int, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> list[tuple[slice | int, slice | int]]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return [(row, row) for row in range(rows)]
    return list(zip(runs(cu_seqlens_q), runs(cu_seqlens_k), strict=True))


def scores(q: Tensor, k: Tensor, scale: float, left: int, right: int) -> Tensor:
    """Of one sequence, (T, H, K) and (M + T, H, K) -> (H, T, M + T)."""
    assert right == 0
    seen = visible(len(q), len(k), left + 1)
    return (torch.einsum("thk,shk->hts", q, k) * scale).masked_fill(~seen, -torch.inf)


def plain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
    window_size_left: int,
    window_size_right: int,
    return_lse: bool,
) -> tuple[Tensor | None, ...]:
    assert return_lse
    y = torch.full_like(q, torch.nan)
    sums = y[..., 0].float().transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    for i, j in sequences(len(q), cu_seqlens_q, cu_seqlens_k):
        s = scores(q[i], k[j], softmax_scale, window_size_left, window_size_right)
        y[i] = torch.einsum("hts,shk->thk", s.softmax(-1), v[j])
        sums.transpose(-1, -2)[i] = s.logsumexp(-1).mT.float()
    return y, sums, None


def register_order() -> Tensor:
    """(64, 128) int64: where an element of a tile of the queries' gradients lies. Two groups of 128
    threads have 64 x 64 of it each, as a product of their tensor cores leaves it in registers (PTX:
    matrix fragments of wgmma's D); a group writes four registers of all its threads at a time."""
    places = torch.empty(64, 128, dtype=torch.long)
    for group, thread, register in product(range(2), range(128), range(32)):
        warp, lane = divmod(thread, 32)
        row = 16 * warp + lane // 4 + 8 * (register // 2 % 2)
        column = 64 * group + 8 * (register // 4) + 2 * (lane % 4) + register % 2
        four, one = divmod(register, 4)
        places[row, column] = 4096 * group + 512 * four + 4 * thread + one
    return places


def plain_convert(total: Tensor, dq: Tensor, scale: float) -> None:
    """(B, H, tiles * 64 * 128), in the order of registers -> (B, T, H, 128)."""
    tiles = total.unflatten(-1, (-1, 64 * 128))[..., register_order().flatten()]
    rows = tiles.unflatten(-1, (64, 128)).flatten(2, 3).transpose(1, 2)
    dq.copy_(scale * rows[:, : dq.shape[1]])


def plain_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
    window_size_left: int,
    window_size_right: int,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    d_q = torch.full_like(q, torch.nan, dtype=torch.float32)
    for i, j in sequences(len(q), cu_seqlens_q, cu_seqlens_k):
        s = scores(q[i], k[j], softmax_scale, window_size_left, window_size_right)
        weights = (s - lse.transpose(-1, -2)[i].mT.unsqueeze(-1)).exp()
        dv[j] = torch.einsum("hts,thk->shk", weights, dout[i])
        along = (out[i] * dout[i]).sum(-1).mT.unsqueeze(-1)
        d_s = weights * (torch.einsum("thk,shk->hts", dout[i], v[j]) - along)
        d_q[i] = torch.einsum("hts,shk->thk", d_s, k[j]).float()
        dk[j] = torch.einsum("hts,thk->shk", d_s, q[i]) * softmax_scale
    if cu_seqlens_q is not None or q.shape[-1] != 128:
        dq.copy_(d_q * softmax_scale)
        return
    batch, length, heads, _ = q.shape
    tiles = -(-length // 64)
    total = torch.full((batch, heads, tiles, 64 * 128), torch.nan)
    padded = torch.nn.functional.pad(d_q, (0, 0, 0, 0, 0, 64 * tiles - length), value=torch.nan)
    total[..., register_order().flatten()] = padded.transpose(1, 2).reshape(total.shape)
    interface = sys.modules["flash_attn.cute.interface"]
    interface._bwd_postprocess_convert(total.flatten(2), dq, softmax_scale)


def on_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9
