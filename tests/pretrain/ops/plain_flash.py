"""FlashAttention-4's functions, as far as our operators call them, in torch for a CPU."""

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
    sums = y[..., 0].float().transpose(-1, -2).contiguous()
    for i, j in sequences(len(q), cu_seqlens_q, cu_seqlens_k):
        s = scores(q[i], k[j], softmax_scale, window_size_left, window_size_right)
        y[i] = torch.einsum("hts,shk->thk", s.softmax(-1), v[j])
        sums.transpose(-1, -2)[i] = s.logsumexp(-1).mT.float()
    return y, sums, None


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
    for i, j in sequences(len(q), cu_seqlens_q, cu_seqlens_k):
        s = scores(q[i], k[j], softmax_scale, window_size_left, window_size_right)
        weights = (s - lse.transpose(-1, -2)[i].mT.unsqueeze(-1)).exp()
        dv[j] = torch.einsum("hts,thk->shk", weights, dout[i])
        along = (out[i] * dout[i]).sum(-1).mT.unsqueeze(-1)
        d_s = weights * (torch.einsum("thk,shk->hts", dout[i], v[j]) - along) * softmax_scale
        dq[i] = torch.einsum("hts,shk->thk", d_s, k[j])
        dk[j] = torch.einsum("hts,thk->shk", d_s, q[i])


def on_hopper() -> bool:
    return torch.cuda.get_device_capability()[0] == 9
