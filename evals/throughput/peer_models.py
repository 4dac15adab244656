"""Public implementations of the same size: width, depth, heads and vocabulary of one of our models.

    llama        transformers' Llama, full attention by SDPA, compiled layer by layer
    llama_cudnn  the same with cuDNN's attention, the faster one on Hopper
    fla_swa      flash-linear-attention's Transformer with a sliding window of 512
    fla_gla      flash-linear-attention's gated linear attention
    fla_mamba2   flash-linear-attention's Mamba-2, two blocks for one of ours, mamba-ssm's kernels
    mamba_ssm    mamba-ssm's own model around these kernels, as deep
    mega_pytorch             Mega-pytorch's MEGA, attention in chunks of 512
    block_recurrent_pytorch  block-recurrent-transformer-pytorch's, blocks of 512, 512 states

Layers have the weights of Llama's with a SwiGLU of 8/3 d: where the mixer has fewer, the MLP has
more. (Mamba-2 has no MLP, and twice the layers.)

Not as in our models, because the packages are so:

- Mega-pytorch's EMA has one decay per head for all channels, and is an FFT in fp32. Its attention
  knows no chunks: they go through it as sequences of their own.
- block-recurrent-transformer-pytorch has one key and value for all heads, and a token sees its
  block and all of the one before, 512 to 1,023 keys for our 512.

FLOPs of mixing, forward, per token and layer:

    attention          4 d x mean number of visible keys; MEGA 2 (d_k + d_v) x that
    linear attention   4 H d_k d_v for states in and out, and the useful half of the products
                       inside chunks of C tokens, C H (d_k + d_v)
    EMA                4 N d for states in and out, N heads; its FFT counts nothing beyond

Mamba-2's chunks (H d_v = 2 d channels, d_k = 128 shared by all heads) count like those of our own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.config import RunConfig

WINDOW = 512
GLA_CHUNK = 64
MAMBA2_STATE, MAMBA2_CHUNK = 128, 256
MEGA_HEADS = 16
EMBEDDING_STD = 0.02  # a tied head's first logits are then a guess


class Shape(NamedTuple):
    """What a peer takes from a model of ours."""

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    vocab_size: int
    length: int


class Backbone(NamedTuple):
    """A peer without its head.

    Attributes:
        module: all of it.
        embedding: (V, D), the head's weight as well.
        hidden_states: tokens (B, T) -> (B, T, D), behind the last norm.
        mixing: forward FLOPs per token, all layers together, besides those of `nn.Linear`.
        compilable: what to compile; nothing where Triton kernels are the package's own.
        rounds_by_all: later tokens change how earlier ones are rounded, as an FFT's do.
    """

    module: nn.Module
    embedding: nn.Embedding
    hidden_states: Callable[[Tensor], Tensor]
    mixing: float
    compilable: Sequence[nn.Module] = ()
    rounds_by_all: bool = False


def shape_of(config: RunConfig) -> Shape:
    """Takes the number of heads from the mixer that most layers have.

    Raises:
        ValueError: that mixer has no heads.
    """
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


def mlp_width(shape: Shape, mixing_weights: int, matrices: int) -> int:
    """Of MLPs of so many matrices that make all layers together as large as Llama's.

    Args:
        shape: of Llama.
        mixing_weights: of everything in the layers but the MLPs.
        matrices: d x width, per MLP.
    """
    d = shape.d_model
    left = shape.n_layers * (4 * d**2 + 3 * d * shape.d_ff) - mixing_weights
    return 64 * max(1, round(left / (64 * matrices * d * shape.n_layers)))


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
    model = LlamaModel(config)
    mixing = shape.n_layers * 4 * shape.d_model * visible
    return _transformers(model, mixing)._replace(compilable=[*model.layers, model.norm])


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
    return _transformers(TransformerModel(config), shape.n_layers * 4 * shape.d_model * visible)


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
    return _transformers(GLAModel(config), shape.n_layers * mixing)


def fla_mamba2(shape: Shape) -> Backbone:
    """flash-linear-attention's Mamba-2 around mamba-ssm's kernels."""
    from evals.throughput import fla_kernels

    fla_kernels.provide_mamba_scan("fla.layers.mamba2")
    from fla.models.mamba2 import Mamba2Config, Mamba2Model

    config = Mamba2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        num_hidden_layers=2 * shape.n_layers,
        head_dim=64,
        expand=2,
        state_size=MAMBA2_STATE,
        chunk_size=MAMBA2_CHUNK,
        use_cache=False,
    )
    return _transformers(Mamba2Model(config), _mamba2_mixing(shape))


def mamba_ssm(shape: Shape) -> Backbone:
    """mamba-ssm's Mamba-2 with the settings of its published models."""
    from evals.throughput import fla_kernels

    fla_kernels.provide_mamba_scan("mamba_ssm.modules.mamba2")
    from mamba_ssm.models.mixer_seq_simple import MixerModel

    model = MixerModel(
        d_model=shape.d_model,
        n_layer=2 * shape.n_layers,
        d_intermediate=0,
        vocab_size=shape.vocab_size,
        ssm_cfg={"layer": "Mamba2", "d_state": MAMBA2_STATE, "chunk_size": MAMBA2_CHUNK},
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
    )
    return Backbone(model, model.embedding, model, _mamba2_mixing(shape))


def mega_pytorch(shape: Shape) -> Backbone:
    """Mega-pytorch's MEGA with the proportions of our mega_350m, in chunks: MEGA-chunk."""
    chunk = _block_size("mega_pytorch", shape)
    with _needs("Mega-pytorch==0.1.0 einops scipy"):
        from mega_pytorch import Mega
        from mega_pytorch import mega_pytorch as package

    # Inductor has no complex kernels, and in torch 2.11 a wrong idea of a spectrum's strides.
    package.conv1d_fft = torch.compiler.disable(_in_fp32(package.conv1d_fft))
    d, n = shape.d_model, shape.n_layers
    d_shared, d_value = d // 4, 2 * d
    width = mlp_width(shape, n * (d * d_shared + 2 * d**2 + 3 * d * d_value), matrices=2)
    model = Mega(
        num_tokens=shape.vocab_size,
        dim=d,
        depth=n,
        ff_mult=(width + 0.5) / d,  # it rounds down
        pre_norm=True,
        ema_heads=MEGA_HEADS,
        attn_dim_qk=d_shared,
        attn_dim_value=d_value,
    )
    for layer, *_ in model.layers:
        layer.single_headed_attn = ChunkedAttention(layer.single_headed_attn, chunk)
    nn.init.normal_(model.token_emb.weight, std=EMBEDDING_STD)
    model.to_logits = model.to_logits[0]  # the norm, without the head
    attention = 2 * (d_shared + d_value) * mean_visible(chunk, chunk)
    bare = 2 * (d**2 + d * d_value)  # weights that are in no nn.Linear
    compilable = [part for mixer, _, mlp, _ in model.layers for part in (mixer, mlp)]
    mixing = n * (attention + bare + 4 * MEGA_HEADS * d)
    return Backbone(model, model.token_emb, model, mixing, compilable, rounds_by_all=True)


def block_recurrent_pytorch(shape: Shape) -> Backbone:
    """block-recurrent-transformer-pytorch's with one recurrent layer, third from the top."""
    block = _block_size("block_recurrent_pytorch", shape)
    # What else it declares, memorizing-transformers-pytorch, is never imported and wants faiss-gpu.
    with _needs("block-recurrent-transformer-pytorch==0.4.4 beartype einops packaging"):
        from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    d, n = shape.d_model, shape.n_layers
    head = d // shape.n_heads
    weights = n * (2 * d**2 + 2 * d * head) + 7 * d**2 + 2 * d * head  # + those of the states
    width = mlp_width(shape, weights, matrices=3)
    model = BlockRecurrentTransformer(
        num_tokens=shape.vocab_size,
        dim=d,
        depth=n,
        dim_head=head,
        heads=shape.n_heads,
        ff_mult=1.5 * (width + 0.5) / d,  # it takes two thirds and rounds down
        max_seq_len=shape.length,
        block_width=block,
        num_state_vectors=block,
        recurrent_layers=(max(1, n - 2),),
        use_flash_attn=True,  # scaled_dot_product_attention, with a mask
    )
    nn.init.normal_(model.token_emb.weight, std=EMBEDDING_STD)
    model.to_logits = model.to_logits[0]  # the norm, without the head
    compilable: list[nn.Module] = []
    for mixer, mlp in model.layers:
        compilable.append(mlp)
        if mixer.is_recurrent_layer:
            # Its states wait in attributes from call to call: only what is a function is compiled.
            states = mixer.state_container
            compilable += [mixer.attn, states.to_state_cross_attn]
            compilable += [states.state_self_attn, states.from_state_cross_attn]
        else:
            compilable.append(mixer)
    # A block's own keys so far, and all of the block before, which the first one has not.
    visible = (block + 1) / 2 + block * (1 - block / shape.length)
    # As many states as tokens read and write once per block; each attends to `block` keys.
    mixing = 4 * d * (n * visible + 3 * block)
    return Backbone(
        model,
        model.token_emb,
        lambda tokens: model(tokens, return_memories_and_states=False)[0],
        mixing,
        compilable,
    )


BUILDERS: dict[str, Callable[[Shape], Backbone]] = {
    "llama": llama,
    "llama_cudnn": llama_cudnn,
    "fla_swa": fla_swa,
    "fla_gla": fla_gla,
    "fla_mamba2": fla_mamba2,
    "mamba_ssm": mamba_ssm,
    "mega_pytorch": mega_pytorch,
    "block_recurrent_pytorch": block_recurrent_pytorch,
}


class ChunkedAttention(nn.Module):
    """Mega-pytorch's attention with chunks of C tokens in the place of sequences."""

    def __init__(self, attention: nn.Module, chunk_size: int) -> None:
        super().__init__()
        self.attention, self.chunk_size = attention, chunk_size

    def forward(self, x: Tensor, v_input: Tensor) -> Tensor:
        """Both (B, T, D) -> (B, T, E)."""
        chunks = (part.unflatten(1, (-1, self.chunk_size)).flatten(0, 1) for part in (x, v_input))
        return self.attention(*chunks).reshape(*x.shape[:2], -1)


def _in_fp32(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of signals and filters that autocast has narrowed: CUDA has no FFT of bf16, and autocast
    widens for it on a CPU alone."""

    def wide(x: Tensor, weights: Tensor, **options: int) -> Tensor:
        return convolution(x.float(), weights.float(), **options)

    return wide


def _transformers(model: nn.Module, mixing: float) -> Backbone:
    """Of a model with the interface of transformers."""
    return Backbone(
        model,
        model.get_input_embeddings(),  # type: ignore[operator]
        lambda tokens: model(input_ids=tokens, use_cache=False).last_hidden_state,
        mixing,
    )


def _mamba2_mixing(shape: Shape) -> float:
    inner = 2 * shape.d_model
    mixing = 4 * inner * MAMBA2_STATE + MAMBA2_CHUNK * (MAMBA2_STATE + inner)
    return 2 * shape.n_layers * mixing


def _block_size(peer: str, shape: Shape) -> int:
    """`WINDOW`, or the length where that is less."""
    if shape.length > WINDOW and shape.length % WINDOW:
        raise ValueError(
            f"lengths={shape.length}: {peer} works in blocks of {WINDOW}; use a multiple of it"
        )
    return min(WINDOW, shape.length)


@contextmanager
def _needs(packages: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{error}; pip install --no-deps {packages}") from error
