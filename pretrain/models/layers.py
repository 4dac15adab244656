"""Channel-wise layers: norm and MLPs, (..., D) in and out, D model width; and first weights."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.ops.normalization import rms_norm
from pretrain.ops.numerics import matmul_dtype
from pretrain.ops.swiglu import Gated, gate_up_linear, swiglu_linear


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) with a learned gain; see `rms_norm`."""

    def __init__(self, d_model: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """The norm of `x`, or of the sum."""
        return rms_norm(x if added is None else x + added, self.weight, self.eps)


class TokenEmbedding(nn.Embedding):
    """A row per token, in the dtype that the residual stream has from there on.

    A stream in autocast's dtype stays in it, because what mixers and MLPs add to it comes from
    matmuls. So train torchtitan and OLMo-core, whose parameters are bf16 in a forward.

    Args:
        vocab_size: rows.
        d_model: model width.
        residual_in_fp32: False: rows are rounded to the dtype in which autocast would run a matmul
            of them; without autocast they stay as they are.
    """

    def __init__(self, vocab_size: int, d_model: int, *, residual_in_fp32: bool) -> None:
        super().__init__(vocab_size, d_model)
        self.residual_in_fp32 = residual_in_fp32

    def forward(self, tokens: Tensor) -> Tensor:
        x = super().forward(tokens)
        return x if self.residual_in_fp32 else x.to(matmul_dtype(x))


class GateUpLinear(nn.Linear):
    """(..., D) -> gate and up. Linears, this and `SwiGLULinear`, so that ZeRO-3 finds a weight."""

    def forward(self, x: Tensor) -> Gated:  # type: ignore[override]
        return gate_up_linear(x, self.weight)


class SwiGLULinear(nn.Linear):
    """Gate and up -> W (silu(gate) * up), (..., D)."""

    def forward(self, gated: Gated) -> Tensor:  # type: ignore[override]
        return swiglu_linear(gated, self.weight)


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) * W_up x) (Shazeer 2020, 2002.05202); gate and up are one matrix."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.in_proj = GateUpLinear(d_model, 2 * d_ff, bias=False)
        self.out_proj = SwiGLULinear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.in_proj(x))


class GEGLU(nn.Module):
    """The same with gelu, by T5 1.1's approximation of it (tanh)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.out_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.in_proj(x).chunk(2, -1)
        return self.out_proj(F.gelu(gate, approximate="tanh") * up)


class GELUMLP(nn.Module):
    """W_out gelu(W_in x), the original Transformer's MLP without biases."""

    activation: Callable[[Tensor], Tensor] = staticmethod(F.gelu)

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_ff, bias=False)
        self.out_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.activation(self.in_proj(x)))


class ReLUMLP(GELUMLP):
    """W_out relu(W_in x), the first T5's."""

    activation = staticmethod(F.relu)


MLPS: dict[str, type[SwiGLU | GEGLU | GELUMLP]] = {
    "swiglu": SwiGLU,
    "geglu": GEGLU,
    "gelu": GELUMLP,
    "relu": ReLUMLP,
}


@torch.no_grad()
def init_weights(
    model: nn.Module,
    std: float,
    n_layers: float,
    tables: tuple[type[nn.Module], ...] = (nn.Embedding,),
) -> None:
    """Draws the weights of all Linears and `tables` from N(0, std^2); zeroes biases.

    Args:
        model: what holds them.
        std: of embeddings and weights.
        n_layers: an `out_proj` is smaller by 1 / sqrt(2 n_layers): each layer adds two terms to the
            residual stream, whose variance stays put (a layer that adds three counts 1.5).
        tables: further modules with a `weight`.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # a plan; drawing into nothing took half of its time
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            scale = (2 * n_layers) ** -0.5 if name.endswith("out_proj") else 1.0
            nn.init.normal_(module.weight, std=std * scale)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, tables):
            nn.init.normal_(cast(Tensor, module.weight), std=std)
