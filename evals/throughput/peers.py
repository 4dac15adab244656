"""Public implementations of the same size: width, depth, heads and vocabulary of one of our models.

    llama        transformers' Llama, full attention by SDPA, compiled layer by layer
    llama_cudnn  the same with cuDNN's attention, the faster one on Hopper
    fla_swa      flash-linear-attention's Transformer with a sliding window of 512
    fla_gla      flash-linear-attention's gated linear attention
    fla_mamba2   flash-linear-attention's Mamba-2, two blocks for one of ours, mamba-ssm's kernels

All of them have our embedding's size and tie it to the head, our chunked loss, our optimizer, fp32
weights under autocast unless told otherwise, and a SwiGLU of 8/3 d as wide (Mamba-2 has none).

FLOPs per token follow the rule for our models, three times the forward: 2 per weight of a linear
layer and of the head, and for mixing tokens, per layer,

    attention          4 d x mean number of visible keys
    linear attention   4 H d_k d_v for states in and out, and the useful half of the products
                       inside chunks of C tokens, C H (d_k + d_v)

Mamba-2's chunks (H d_v = 2 d channels, d_k = 128 shared by all heads) count like those of our own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evals.throughput.settings import Measurement
from pretrain.config import RunConfig
from pretrain.ops.cross_entropy import linear_cross_entropy
from pretrain.training.engine import COMPILED_ERROR

WINDOW = 512
GLA_CHUNK = 64
MAMBA2_STATE = 128


class Shape(NamedTuple):
    """What a peer takes from a model of ours."""

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    vocab_size: int
    length: int


class Backbone(NamedTuple):
    """`module(input_ids=..., use_cache=False)` gives hidden states; mixing is forward FLOPs per
    token, all layers together, besides those of weights."""

    module: nn.Module
    mixing: float


def shape_of(config: RunConfig) -> Shape:
    """Takes the number of heads from the mixer that most layers have."""
    model = config.model
    names = model.layer_names()
    options = model.mixers.get(max(names, key=names.count)) or {}
    if "n_heads" not in options:
        raise ValueError(
            f"like={config.name}: its layers name no n_heads for a peer to take; use like=swa_350m"
        )
    d_ff = 64 * -(-8 * model.d_model // (3 * 64))
    return Shape(
        model.d_model,
        model.n_layers,
        options["n_heads"],
        d_ff,
        model.vocab_size,
        config.train.seq_len,
    )


def mean_visible(length: int, window: int) -> float:
    """Keys that a token of a causal window sees, itself included, in the mean over a sequence."""
    w = min(window, length)
    return w - w * (w - 1) / (2 * length)


def llama(shape: Shape) -> Backbone:
    """transformers' Llama."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_heads,
        intermediate_size=shape.d_ff,
        max_position_embeddings=shape.length,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    visible = mean_visible(shape.length, shape.length)
    return Backbone(LlamaModel(config), shape.n_layers * 4 * shape.d_model * visible)


def llama_cudnn(shape: Shape) -> Backbone:
    """transformers' Llama where scaled_dot_product_attention may only be cuDNN's."""
    if not torch.cuda.is_available():
        raise ImportError("cuDNN's attention needs a GPU")
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    return llama(shape)


def fla_swa(shape: Shape) -> Backbone:
    """flash-linear-attention's Transformer with a window."""
    from evals.throughput import fla_kernels

    fla_kernels.provide_flash_attention()
    from fla.models.transformer import TransformerConfig, TransformerModel

    config = TransformerConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_heads=shape.n_heads,
        intermediate_size=shape.d_ff,
        window_size=WINDOW,
        max_position_embeddings=shape.length,
        use_cache=False,
    )
    visible = mean_visible(shape.length, WINDOW)
    return Backbone(TransformerModel(config), shape.n_layers * 4 * shape.d_model * visible)


def fla_gla(shape: Shape) -> Backbone:
    """flash-linear-attention's GLA with its own head sizes: 4 heads, d_k = d / 8, d_v = d / 4."""
    from evals.throughput import fla_kernels

    fla_kernels.check()
    from fla.models.gla import GLAConfig, GLAModel

    config = GLAConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_heads=4,
        intermediate_size=shape.d_ff,
        use_cache=False,
    )
    keys, values = shape.d_model // 2, shape.d_model  # of all heads
    mixing = 4 * keys * values / 4 + GLA_CHUNK * (keys + values)
    return Backbone(GLAModel(config), shape.n_layers * mixing)


def fla_mamba2(shape: Shape) -> Backbone:
    """flash-linear-attention's Mamba-2 around mamba-ssm's kernels."""
    from evals.throughput import fla_kernels

    fla_kernels.provide_mamba_scan()
    from fla.models.mamba2 import Mamba2Config, Mamba2Model

    config = Mamba2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        num_hidden_layers=2 * shape.n_layers,
        head_dim=64,
        expand=2,
        state_size=MAMBA2_STATE,
        use_cache=False,
    )
    inner = 2 * shape.d_model
    mixing = 4 * inner * MAMBA2_STATE + config.chunk_size * (MAMBA2_STATE + inner)
    return Backbone(Mamba2Model(config), 2 * shape.n_layers * mixing)


BUILDERS: dict[str, Callable[[Shape], Backbone]] = {
    "llama": llama,
    "llama_cudnn": llama_cudnn,
    "fla_swa": fla_swa,
    "fla_gla": fla_gla,
    "fla_mamba2": fla_mamba2,
}


class Peer:
    """A backbone with our loss; see `candidates.Candidate`."""

    def __init__(self, m: Measurement, config: RunConfig, device: torch.device) -> None:
        shape = shape_of(config)
        with device:
            self.module, mixing = BUILDERS[m.model](shape)
        if m.precision == "bf16_weights":
            self.module.to(torch.bfloat16)
        if m.checkpointing:
            kwargs = {"use_reentrant": False}
            self.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]
        self.module.train()
        self.chunk_size = config.model.loss_chunk_size
        linear = (part for part in self.module.modules() if isinstance(part, nn.Linear))
        weights = sum(part.weight.numel() for part in linear)
        head = shape.vocab_size * shape.d_model
        self.train_flops = 3 * (2 * (weights + head) + mixing)
        self.compilable = m.model.startswith("llama")
        self.example = (m.batch_size, m.length, shape.d_model)

    def compile(self) -> None:
        """Compiles every layer of Llama; the others bring Triton kernels of their own."""
        if not self.compilable:
            return
        torch._dynamo.config.recompile_limit = 64
        module: Any = self.module
        for part in (*module.layers, module.norm):
            part.compile(dynamic=False)
        weight = next(module.parameters())
        x = torch.randn(self.example, device=weight.device, dtype=weight.dtype)
        positions = torch.arange(self.example[1], device=weight.device).unsqueeze(0)
        angles = module.rotary_emb(x, positions)
        layer = module.layers[0]
        pairs = []
        for call in (layer.forward, layer):
            y = call(x, position_embeddings=angles) - x
            gradients = torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))
            flat = torch.cat([g.flatten().float() for g in gradients])
            pairs.append((y.detach().float(), flat))
        errors = [((b - a).norm() / a.norm()).item() for a, b in zip(*pairs, strict=True)]
        if not max(errors) < COMPILED_ERROR:
            raise ValueError(
                f"Llama's compiled layer differs from the same layer uncompiled by "
                f"{max(errors):.3f} in its output or gradients; use compile=false or another torch"
            )

    def loss(self, tokens: Tensor) -> Tensor:
        output = self.module(input_ids=tokens[:, :-1], use_cache=False)
        hidden, targets = output.last_hidden_state.flatten(0, 1), tokens[:, 1:].flatten()
        weight = self.module.get_input_embeddings().weight  # type: ignore[operator]
        counted = torch.ones_like(targets, dtype=torch.bool)
        return linear_cross_entropy(
            hidden, weight, targets, counted, chunk_size=self.chunk_size
        ).loss_sum

    def after_step(self) -> None:
        """Nothing."""
