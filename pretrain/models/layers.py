"""Channel-wise layers: norm and MLPs, (..., D) in and out, D model width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.ops.normalization import rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) with a learned gain; see `rms_norm`."""

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) * W_up x) (Shazeer 2020, 2002.05202); gate and up are one matrix."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.out_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.in_proj(x).chunk(2, -1)
        return self.out_proj(F.silu(gate) * up)


class GELUMLP(nn.Module):
    """W_out gelu(W_in x), the original Transformer's MLP without biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_ff, bias=False)
        self.out_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.gelu(self.in_proj(x)))


MLPS: dict[str, type[SwiGLU | GELUMLP]] = {"swiglu": SwiGLU, "gelu": GELUMLP}
