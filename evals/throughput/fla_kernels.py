"""Makes flash-linear-attention's models run where packages with CUDA extensions are not installed.

Its Transformer wants flash-attn: torch brings the same FlashAttention-2 kernels, with windows, as
`aten._flash_attention_forward`. Its Mamba-2, and mamba-ssm's own, want mamba-ssm, whose Triton
kernels need no build but are not importable without it, and causal-conv1d, for which
flash-linear-attention has a Triton kernel. Written for flash-linear-attention and fla-core 0.6.0,
mamba-ssm 2.3.2.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def check() -> None:
    """Raises ImportError when flash-linear-attention is missing, or its kernels cannot run."""
    for name in ("triton", "fla"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} is not installed; pip install -e '.[throughput]'")
    if not torch.cuda.is_available():
        raise ImportError("flash-linear-attention's kernels need a GPU")


def provide_flash_attention() -> None:
    """Lets `fla.layers.attn` use torch's FlashAttention-2, unless flash-attn is installed."""
    check()
    import fla.layers.attn as attention

    if attention.flash_attn_func is None:
        attention.flash_attn_func = window_flash_attention


def window_flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """flash_attn_func of flash-attn, (B, T, H, K), as far as it is called here."""
    assert causal
    narrow = torch.bfloat16
    return _WindowFlashAttention.apply(q.to(narrow), k.to(narrow), v.to(narrow), window_size[0])


class _WindowFlashAttention(torch.autograd.Function):
    """aten's operators; `left` keys before its own that a token sees, -1: all."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
        # is_causal would override the window: causal is a window that ends at the query.
        ctx.options = {"window_size_left": left, "window_size_right": 0} if left >= 0 else {}
        ctx.causal = left < 0
        y, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, ctx.causal, False), **ctx.options
        )
        ctx.save_for_backward(q, k, v, y, lse, seed, offset)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, seed, offset = ctx.saved_tensors
        sizes = None, None, q.shape[1], k.shape[1], 0.0, ctx.causal
        gradients = torch.ops.aten._flash_attention_backward(
            d_y.contiguous(), q, k, v, y, lse, *sizes, seed, offset, **ctx.options
        )
        return *gradients, None


def provide_mamba_scan(layers: str) -> None:
    """Lets a module of Mamba-2 layers use mamba-ssm's Triton scan beside fla's Triton convolution,
    unless causal-conv1d is installed, with which mamba-ssm fuses both.

    Args:
        layers: "fla.layers.mamba2" or "mamba_ssm.modules.mamba2".
    """
    check()
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        raise ImportError(
            "mamba_ssm is not installed; MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE "
            "pip install --no-deps --no-build-isolation mamba-ssm"
        )
    if "mamba_ssm" not in sys.modules:
        # Its __init__ imports the CUDA extension; the Triton kernels below it do not.
        package = ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or [])
        package.__spec__ = spec
        sys.modules["mamba_ssm"] = package
    extension = "selective_scan_cuda"  # Mamba-1's: models import it, no Mamba-2 calls it
    if extension not in sys.modules and importlib.util.find_spec(extension) is None:
        sys.modules[extension] = ModuleType(extension)
    module = importlib.import_module(layers)
    if module.causal_conv1d_fn is None:
        module.mamba_split_conv1d_scan_combined = split_conv_scan  # type: ignore[attr-defined]


def split_conv_scan(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    *,
    activation: str,
    rmsnorm_weight: Tensor,
    rmsnorm_eps: float,
    outproj_weight: Tensor,
    outproj_bias: Tensor | None,
    headdim: int,
    ngroups: int,
    norm_before_gate: bool,
    **_: Any,
) -> Tensor:
    """mamba-ssm's function of this name in its parts: convolution, scan, gated norm, projection.

    Args:
        projected: (B, T, 2 H P + 2 G N + H): gate, convolved part (x, B, C) and dt.
        conv_weight: (H P + 2 G N, 4).
        conv_bias: like the convolved part, or None.
        dt_bias: (H,).
        A: (H,), negative.
        D: (H,).
        chunk_size: tokens.
        activation: behind the convolution.
        rmsnorm_weight: (H P,).
        rmsnorm_eps: of the norm.
        outproj_weight: (D, H P).
        outproj_bias: (D,) or None.
        headdim: P.
        ngroups: G.
        norm_before_gate: order of norm and gate.
    """
    from fla.modules.convolution import causal_conv1d
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    heads = len(dt_bias)
    inner = heads * headdim
    states = (projected.shape[-1] - 2 * inner - heads) // 2
    gate, mixed, dt = projected.split([inner, inner + 2 * states, heads], -1)
    mixed, _ = causal_conv1d(
        x=mixed.contiguous(),
        weight=conv_weight.to(mixed.dtype),
        bias=None if conv_bias is None else conv_bias.to(mixed.dtype),
        activation=activation,
    )
    x, B, C = mixed.split([inner, states, states], -1)
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size=chunk_size,
        D=D,
        dt_bias=dt_bias,
        dt_softplus=True,
    )
    y = rmsnorm_fn(
        *(y.flatten(2), rmsnorm_weight, None),
        z=gate.contiguous(),
        eps=rmsnorm_eps,
        norm_before_gate=norm_before_gate,
    )
    return F.linear(y, outproj_weight, outproj_bias)
