"""T5 (Raffel et al. 2020, 1910.10683) as transformers stores it, as a model of ours.

    model = build_model(t5_config(json.loads(Path("config.json").read_text())))
    model.load_state_dict(t5_weights(state_dict))

Both versions: the first (relu, tied head behind a scale) and 1.1 (gated gelu, a head of its own).
Theirs drops attention weights and the MLP's inside as well; here it is `model.dropout`, 0 unless it
is set. Token ids are T5's own, which no tokenizer of `data` gives: end of text is 1, spans count
down from the last of the vocabulary's 32,100.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.models.config import EncoderStackConfig, LanguageModelConfig, LayersConfig

MLP_OF = {"relu": "relu", "gated-gelu": "geglu"}


def t5_config(theirs: Mapping[str, Any]) -> LanguageModelConfig:
    """Our configuration of a T5.

    Args:
        theirs: the contents of its config.json.

    Raises:
        ValueError: another activation, or buckets and norms that are not T5's.
    """
    fixed = {
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    }
    for key, ours in fixed.items():
        if theirs.get(key, ours) != ours:
            raise ValueError(f"{key}={theirs[key]}: every released T5 has {ours}, and so has ours")
    activation = theirs.get("feed_forward_proj", "relu")
    if activation not in MLP_OF:
        raise ValueError(f"feed_forward_proj={activation}: must be one of {', '.join(MLP_OF)}")
    tied = theirs.get("tie_word_embeddings", True)
    heads = {"n_heads": theirs["num_heads"], "head_dim": theirs["d_kv"], "scale_scores": False}
    mixers = {"attention": heads | {"position": "t5"}}
    layers, n_layers = LayersConfig(default="attention"), theirs["num_layers"]
    return LanguageModelConfig(
        vocab_size=theirs["vocab_size"],
        d_model=theirs["d_model"],
        n_layers=theirs.get("num_decoder_layers") or n_layers,
        layers=layers,
        mixers=mixers,
        mlp=MLP_OF[activation],
        d_ff=theirs["d_ff"],
        tie_embeddings=tied,
        scale_logits=tied,
        encoder=EncoderStackConfig(n_layers=n_layers, layers=layers, mixers=mixers),
        cross_attention=heads,
    )


def t5_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of T5ForConditionalGeneration by our names; gradients are renamed alike."""
    ours = {
        "embedding.weight": theirs["shared.weight"],
        "head.weight": theirs.get("lm_head.weight", theirs["shared.weight"]),
        "encoder_norm.weight": theirs["encoder.final_layer_norm.weight"],
        "norm.weight": theirs["decoder.final_layer_norm.weight"],
    }
    for stack in ("encoder", "decoder"):
        prefix = f"{stack}.block."
        n_layers = 1 + max(int(key.split(".")[2]) for key in theirs if key.startswith(prefix))
        table = theirs[f"{prefix}0.layer.0.SelfAttention.relative_attention_bias.weight"]
        for i in range(n_layers):
            block = f"{stack}_blocks.{i}."
            ours[f"{block}mixer.position_bias.table"] = table.T
            for name, parts in _parts(stack).items():
                keys = [f"{prefix}{i}.layer.{part}.weight" for part in parts]
                ours[f"{block}{name}.weight"] = torch.cat([theirs[k] for k in keys if k in theirs])
    return ours


def _parts(stack: str) -> dict[str, list[str]]:
    """Which matrices of theirs, one below the other, are one of ours; (layer within a block)."""
    last = 1 if stack == "encoder" else 2
    parts = {
        "mixer_norm": ["0.layer_norm"],
        "mixer.qkv_proj": [f"0.SelfAttention.{name}" for name in "qkv"],
        "mixer.out_proj": ["0.SelfAttention.o"],
        "mlp_norm": [f"{last}.layer_norm"],
        "mlp.in_proj": [f"{last}.DenseReluDense.{name}" for name in ("wi", "wi_0", "wi_1")],
        "mlp.out_proj": [f"{last}.DenseReluDense.wo"],
    }
    if stack == "decoder":
        parts |= {
            "cross_norm": ["1.layer_norm"],
            "cross.q_proj": ["1.EncDecAttention.q"],
            "cross.kv_proj": ["1.EncDecAttention.k", "1.EncDecAttention.v"],
            "cross.out_proj": ["1.EncDecAttention.o"],
        }
    return parts
