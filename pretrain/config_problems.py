"""What is inconsistent in a configuration, found without data, model or process group."""

import itertools
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import RunConfig

DENOISING = ("span", "ul2", "gap")
BOUNDARIES = {
    "lanes": ("pad_block", "pad_segment", "cross"),
    "windows": ("packed", "pad_block"),
    "stream": ("packed",),
}


def launcher_world_size() -> int:
    """Processes started by deepspeed, torchrun or srun; 1 for a plain `python`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def problems_of(config: "RunConfig") -> list[str]:
    """Inconsistencies that need no data, no model and no process group to be seen."""
    train, problems = config.train, []
    boundaries = BOUNDARIES.get(config.data.mode, ("",))
    choices = {
        "data.mode": (config.data.mode, ("lanes", "windows", "stream")),
        "data.boundary": (config.data.boundary or boundaries[0], boundaries),
        "objective": (config.objective, ("causal", *DENOISING)),
        "train.precision": (train.precision, ("bf16", "fp32")),
        "schedule.type": (config.schedule.type, ("wsd", "cosine", "constant")),
        "zero.stage": (config.zero.stage, (0, 1, 2, 3)),
        "resume.mode": (config.resume.mode, ("auto", "must", "never")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            problems.append(f"{key}={value}: must be one of {', '.join(map(str, allowed))}")
    positive = {
        "train.seq_len": train.seq_len,
        "train.global_batch_tokens": train.global_batch_tokens,
        "train.micro_batch_size": train.micro_batch_size,
        "train.total_tokens": train.total_tokens,
        "eval.tokens_per_document": config.eval.tokens_per_document,
        "train.max_consecutive_skips": train.max_consecutive_skips,
        "train.process_group_timeout_minutes": train.process_group_timeout_minutes,
        "optim.learning_rate": config.optim.learning_rate,
        "optim.ssm_learning_rate": config.optim.ssm_learning_rate,
        "data.loader_threads": config.data.loader_threads,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "logging.every_steps": config.logging.every_steps,
        "optim.eps": config.optim.eps,
        "data.streams": config.data.streams,
        "data.shuffle_windows": config.data.shuffle_windows,
        "data.stream_threads": config.data.stream_threads,
        "data.hub_patience_seconds": config.data.hub_patience_seconds,
    }
    problems += [f"{k}={v}: must be greater than 0" for k, v in positive.items() if not v > 0]
    not_negative = {
        "world_size": config.world_size,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.grad_clip": config.optim.grad_clip,
        "checkpoint.every_tokens": config.checkpoint.every_tokens,
        "checkpoint.keep_every_tokens": config.checkpoint.keep_every_tokens,
        "eval.every_tokens": config.eval.every_tokens,
        "eval.documents": config.eval.documents,
        "data.prefetch_steps": config.data.prefetch_steps,
    }
    problems += [f"{k}={v}: must not be negative" for k, v in not_negative.items() if not v >= 0]
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        problems.append(f"optim.betas={list(config.optim.betas)}: must lie between 0 and 1")
    for key in ("warmup_fraction", "decay_fraction", "final_ratio"):
        value = getattr(config.schedule, key)
        if not 0 <= value <= 1:
            problems.append(f"schedule.{key}={value}: must lie between 0 and 1")
    fractions = config.schedule.warmup_fraction + config.schedule.decay_fraction
    if config.schedule.type == "wsd" and fractions > 1:
        problems.append(
            f"schedule.warmup_fraction + decay_fraction = {fractions:g}: more than the run; "
            f"lower one of them"
        )
    if config.zero.offload_optimizer and config.zero.stage == 0:
        problems.append(
            "zero.offload_optimizer=true with zero.stage=0: every rank keeps a whole optimizer "
            "there; use zero.stage=1, 2 or 3"
        )
    if train.carry_state and config.data.mode in ("windows", "stream"):
        problems.append(
            f"train.carry_state=true with data.mode={config.data.mode}: shuffled windows have no "
            f"predecessor whose state could be carried; use data.mode=lanes"
        )
    if train.cuda_graphs and config.zero.stage == 3:
        problems.append(
            "train.cuda_graphs=true with zero.stage=3: a recording reads weights where they were, "
            "and ZeRO-3 gathers them anew; use zero.stage=0, 1 or 2"
        )
    if train.cuda_graphs and config.model.activation_checkpointing:
        problems.append(
            "train.cuda_graphs=true with model.activation_checkpointing=true: recomputing sets the "
            "random generator back, which cannot be recorded; use one of the two"
        )
    problems += _objective_problems(config)
    problems += _mixture_problems(config)
    if config.data.mode == "stream":
        problems += _stream_problems(config)
    steps = re.fullmatch(r"(\d+):(\d+)", config.profile.steps)
    if config.profile.steps and not (steps and 0 < int(steps[1]) < int(steps[2])):
        problems.append(
            f"profile.steps={config.profile.steps}: write FIRST:LAST, e.g. 10:13 for steps 10, 11 "
            f"and 12 of the console; the first is 1; quote it in a YAML file"
        )
    if min(train.seq_len, train.global_batch_tokens, train.micro_batch_size) > 0:
        problems += _batch_problems(config)
    return problems


def _objective_problems(config: "RunConfig") -> list[str]:
    data, has_encoder = config.data, config.model.has_encoder
    if config.objective not in DENOISING:
        if not has_encoder:
            return []
        return [
            f"objective={config.objective}: the model has an encoder "
            f"(model.encoder.n_layers={config.model.encoder.n_layers}), which a language model's "
            f"objective leaves idle; choose from {', '.join(DENOISING)}"
        ]
    problems = []
    if not has_encoder:
        problems.append(
            f"objective={config.objective}: it is for encoder-decoders, and the model has no "
            f"encoder; pick one, e.g. model=spade_t5_tiny, or use objective=causal"
        )
    elif data.mode != "windows":  # otherwise said by the encoder-decoders' own files
        problems.append(
            f"data.mode={data.mode} with objective={config.objective}: inputs are cut from "
            f"shuffled windows of a prepared corpus; use data.mode=windows"
        )
    if data.boundary not in ("", "packed"):
        problems.append(
            f"data.boundary={data.boundary} with objective={config.objective}: inputs are exactly "
            f"full, documents stand side by side in them; leave it out"
        )
    if data.mixture:
        problems.append(
            f"data.mixture with objective={config.objective}: one corpus is read; use data.path"
        )
    return problems


def _mixture_problems(config: "RunConfig") -> list[str]:
    entries, phases, problems = config.data.mixture, config.data.phases, []
    for i, entry in enumerate(entries):
        if not entry.path:
            problems.append(f"data.mixture[{i}].path='': name a folder of launch/prepare.py")
        if not entry.weight >= 0:
            problems.append(f"data.mixture[{i}].weight={entry.weight}: must not be negative")
    if entries and not sum(entry.weight for entry in entries) > 0:
        problems.append("data.mixture: all weights are 0; raise one")
    if entries and config.eval.documents and not config.data.path:
        problems.append(
            "data.path='' with data.mixture: name the corpus to validate on, or use "
            "eval.documents=0"
        )
    for i, phase in enumerate(phases):
        if len(phase.weights) != len(entries):
            problems.append(
                f"data.phases[{i}].weights={phase.weights}: give one for each of the "
                f"{len(entries)} entries of data.mixture"
            )
    starts = [0, *(phase.from_tokens for phase in phases)]
    if any(after <= before for before, after in itertools.pairwise(starts)):
        problems.append(
            f"data.phases begin at from_tokens={starts[1:]}: must be above 0, where data.mixture's "
            "own weights begin, and ascend"
        )
    return problems


def _stream_problems(config: "RunConfig") -> list[str]:
    data, problems = config.data, []
    if data.mixture:
        problems.append("data.mixture with data.mode=stream: a mixture is of prepared corpora")
    if not data.source:
        problems.append(
            "data.source='' with data.mode=stream: name text, e.g. texts/*.jsonl.zst or "
            "hf://datasets/OWNER/NAME/PATTERN, or pick data=NAME"
        )
    if not data.tokenizer:
        problems.append(
            "data.tokenizer='' with data.mode=stream: give the path of a SentencePiece .model or "
            "bytes (launch/prepare.py trains one and leaves it in its folder, tokenizer.model)"
        )
    if config.eval.documents and not data.val_source:
        problems.append(
            "data.val_source='' with data.mode=stream: name text to evaluate on, or use "
            "eval.documents=0"
        )
    if data.tee and not data.path:
        problems.append("data.path='' with data.tee=true: name the folder of the shards")
    limit = 60 * config.train.process_group_timeout_minutes
    if data.hub_patience_seconds >= limit:
        problems.append(
            f"data.hub_patience_seconds={data.hub_patience_seconds:g}: the other ranks give up on "
            f"a waiting one after {limit} s; raise train.process_group_timeout_minutes"
        )
    return problems


def _batch_problems(config: "RunConfig") -> list[str]:
    launched = launcher_world_size()
    if config.world_size and not config.dry_run and config.world_size != launched:
        return [
            f"world_size={config.world_size}: {launched} process(es) were started; drop the key or "
            f"start {config.world_size}"
        ]
    world_size = config.world_size or launched
    train = config.train
    unit = train.seq_len * train.micro_batch_size * world_size
    if train.global_batch_tokens % unit == 0:
        return []
    below = train.global_batch_tokens // unit * unit
    nearest = " or ".join(str(n) for n in (below, below + unit) if n)
    return [
        f"train.global_batch_tokens={train.global_batch_tokens}: not a multiple of "
        f"seq_len*micro_batch_size*world_size = {train.seq_len}*{train.micro_batch_size}*"
        f"{world_size} = {unit}; nearest: {nearest}"
    ]
