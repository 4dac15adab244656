"""What a run will be, before it starts: sizes, FLOPs, batch triple, memory and hours.

Printed by `dry_run=true` and as the first screen of every run. The model is built on the meta
device, so a 1.3B plan needs neither a GPU nor the memory. FLOPs follow one convention: 3 x the
forward multiply-adds of weights, visible attention keys and the useful half of the SSM's Toeplitz
product, without recomputation; the same number is MFU's numerator.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pretrain.config import RunConfig, differences
from pretrain.models import EncoderDecoder, LanguageModel, build_model
from pretrain.training.metrics import PEAK_BF16_FLOPS

PLANNED_VOCAB_SIZE = 32_128  # where no corpus is named: T5's 32,000 pieces, padded
FLOP_CONVENTION = "train FLOPs = 3 x forward; attention counts visible keys only; no recomputation"
PLANNED_MFU = 0.4


@dataclass(frozen=True)
class Plan:
    """Numbers of a run; bytes are per rank and estimates, except parameters and optimizer."""

    world_size: int
    parameters: dict[str, int]
    train_flops_per_token: dict[str, float]
    grad_accum_steps: int
    total_steps: int
    memory_bytes: dict[str, float]
    h100_hours: float


def train_flops_per_token(model: nn.Module, seq_len: int, target_length: int) -> float:
    """Forward and backward; `target_length` tokens per row of an encoder-decoder, otherwise 0."""
    return math.fsum(_train_flops(model, seq_len, target_length).values())


def _train_flops(model: Any, seq_len: int, target_length: int) -> dict[str, float]:
    lengths = (seq_len, target_length) if target_length else (seq_len,)
    return {kind: 3.0 * flops for kind, flops in model.flops_per_token(*lengths).items()}


def make_plan(config: RunConfig, world_size: int, target_length: int = 0) -> Plan:
    """Builds the model on the meta device and derives everything else.

    Args:
        config: of the run.
        world_size: data-parallel ranks.
        target_length: tokens of a row's targets in encoder-decoder training, else 0.

    Raises:
        ValueError: when the model configuration is inconsistent, or the run does not fit it.
    """
    with torch.device("meta"):
        model = build_model(config.model)
    check_run_fits_model(config, model, target_length)
    parameters = model.parameter_counts()
    train_flops = _train_flops(model, config.train.seq_len, target_length)
    total_flops = sum(train_flops.values()) * config.train.total_tokens
    return Plan(
        world_size=world_size,
        parameters=parameters,
        train_flops_per_token=train_flops,
        grad_accum_steps=config.grad_accum_steps(world_size),
        total_steps=config.total_steps,
        memory_bytes=_memory(config, sum(parameters.values()), world_size, target_length),
        h100_hours=total_flops / (PLANNED_MFU * PEAK_BF16_FLOPS["H100"] * world_size) / 3600,
    )


def check_run_fits_model(
    config: RunConfig, model: LanguageModel | EncoderDecoder, target_length: int = 0
) -> None:
    """Refuses segments, states and targets that the model cannot take.

    Raises:
        ValueError: with every key that does not fit, one line each.
    """
    seq_len, grid, limit = config.train.seq_len, model.reset_grid, model.longest_segment
    problems = []
    if config.data.mode == "lanes" and seq_len % grid:
        below = seq_len // grid * grid
        nearest = " or ".join(str(n) for n in (below, below + grid) if n)
        problems.append(
            f"train.seq_len={seq_len}: not a multiple of the model's reset grid {grid}, on which "
            f"documents start (windows, blocks and chunks end there); nearest: {nearest}"
        )
    if config.train.carry_state and not model.constant_state:
        problems.append(
            "train.carry_state=true: a layer of this model has no state of constant size (it keeps "
            "every past token, or is tied to its segment); use train.carry_state=false"
        )
    if limit and config.data.mode == "lanes":
        problems.append(
            "data.mode=lanes: documents begin inside segments there, and a layer of this model has "
            "filters without a recurrence; use data.mode=windows data.boundary=packed"
        )
    if limit and target_length > limit:
        problems.append(
            f"train.seq_len={seq_len}: objective={config.objective} makes targets of "
            f"{target_length} tokens of it, and a layer of the decoder knows no lags beyond its "
            f"train_length={limit}; shorten the inputs or raise train_length"
        )
    if limit and not target_length and seq_len > limit:
        problems.append(
            f"train.seq_len={seq_len}: a layer of this model knows no lags beyond its "
            f"train_length={limit}; use train.seq_len={limit} or raise train_length"
        )
    if problems:
        raise ValueError("\n".join(problems))


def _memory(
    config: RunConfig, parameters: int, world_size: int, target_length: int
) -> dict[str, float]:
    """Bytes per rank. fp32 parameters, gradients, master copy and two Adam moments, each divided
    by the world size from the ZeRO stage on that shards it; activations are a rule of thumb."""
    stage, model, train = config.zero.stage, config.model, config.train

    def share(sharded_from_stage: int) -> int:
        return world_size if stage >= sharded_from_stage else 1

    host = config.zero.offload_optimizer
    activation_width = 2 if train.precision == "bf16" else 4
    tokens = train.micro_batch_size * (target_length or train.seq_len)  # the decoder's
    encoder_tokens = train.micro_batch_size * train.seq_len
    # Per layer and token: mixer about 8 d, MLP about 3 d_ff + 2 d kept for the backward pass; with
    # checkpointing only the block's input, plus one block's worth while it is recomputed.
    kept = 10 * model.d_model + 3 * model.feed_forward_size
    layer_tokens = model.n_layers * tokens + model.encoder.n_layers * encoder_tokens
    if model.activation_checkpointing:
        activations = layer_tokens * model.d_model + kept * max(tokens, encoder_tokens)
    else:
        activations = layer_tokens * kept
    loss_chunk = min(tokens, model.loss_chunk_size)
    master = 0 if stage == 0 else 4 * parameters / world_size
    return {
        "parameters": 4 * parameters / share(3),
        "gradients": 4 * parameters / share(2),
        "optimizer state": 0 if host else master + 8 * parameters / share(1),
        "activations (estimate)": activation_width * activations,
        "loss chunk": 8.0 * loss_chunk * model.vocab_size,
    }


def describe(config: RunConfig, plan: Plan) -> str:
    """The first screen of a run."""
    train = config.train
    lines = ["configuration, where it differs from the defaults:"]
    changed = differences(config)
    lines += [f"  {key} = {value}" for key, (_, value) in changed.items()] or ["  (nothing)"]
    lines += ["", "parameters by layer kind", *_table(plan.parameters, "{:>16,d}")]
    lines += [
        "",
        f"train FLOPs per token at {train.seq_len} tokens ({FLOP_CONVENTION})",
        *_table(plan.train_flops_per_token, "{:>16,.0f}"),
        "",
        f"batch    {train.global_batch_tokens:,} tokens = micro batch {train.micro_batch_size} x "
        f"{train.seq_len} tokens x {plan.world_size} ranks x {plan.grad_accum_steps} accumulation",
        f"length   {train.total_tokens:,} tokens = {plan.total_steps:,} steps",
        f"ZeRO     stage {config.zero.stage}, {train.precision}",
        "",
        "memory per rank",
        *(f"  {name:<28}{_gib(size):>16}" for name, size in plan.memory_bytes.items()),
        f"  {'total':<28}{_gib(math.fsum(plan.memory_bytes.values())):>16}",
        "",
        f"expected  {plan.h100_hours:.2f} h on {plan.world_size} H100 at {PLANNED_MFU:.0%} MFU "
        f"(these FLOPs over the dense bf16 peak)",
    ]
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3f} GiB"


def _table(rows: dict[str, int] | dict[str, float], number: str) -> list[str]:
    total = sum(rows.values())
    return [
        *(f"  {kind:<28}{number.format(value)}" for kind, value in rows.items()),
        f"  {'total':<28}{number.format(total)}",
    ]
