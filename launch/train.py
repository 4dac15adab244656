"""Trains a model: deepspeed launch/train.py experiment=NAME [KEY=VALUE ...]

A plain `python launch/train.py` trains in one process. The same command resumes a run from its
newest complete checkpoint. Exit codes: 0 finished (RUN/DONE is there), 75 stopped by SIGTERM after
a checkpoint (start the same command again), 2 bad configuration or input, 1 anything else.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

# `deepspeed` runs this file by its path: make the repository's packages importable from it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from launch.denoising_data import read_denoising, target_length
from launch.training_data import (
    describe_prepared,
    open_prepared,
    open_tokenizer,
    read_prepared,
    read_stream,
)
from pretrain.config import (
    RunConfig,
    differences,
    load_config,
    load_saved_config,
    save_config,
)
from pretrain.config_problems import launcher_world_size
from pretrain.files import write_json
from pretrain.models import LanguageModelConfig, build_model
from pretrain.ops.kernel_packages import describe_missing
from pretrain.training.catalogue import catalogue, describe_catalogue
from pretrain.training.checkpoint import checkpoint_bytes, on_main
from pretrain.training.engine import deepspeed_config, start_process_group
from pretrain.training.environment import describe_environment, git_commit
from pretrain.training.leaving import leave
from pretrain.training.manifest import CheckpointError, check_room
from pretrain.training.metrics import say
from pretrain.training.plan import (
    PLANNED_VOCAB_SIZE,
    check_run_fits_model,
    describe,
    make_plan,
)
from pretrain.training.run_lock import lock_run
from pretrain.training.trainer import RankError, Trainer, TrainingError

FINISHED, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    try:
        trainer = set_up(arguments)
    except (ValueError, CheckpointError) as error:
        complain(error)
        return BAD_INPUT if isinstance(error, ValueError) else FAILED
    if trainer is None:
        return FINISHED
    try:  # from here on a ValueError is a bug, and keeps its traceback
        return FINISHED if trainer.fit() else PREEMPTED
    except (TrainingError, CheckpointError) as error:
        complain(error)
        return FAILED


def complain(error: Exception) -> None:
    """Prints the error once: rank 0 speaks for all, except of a rank's own.

    Before the ranks have met, the first of each node speaks: only its files may be at fault.
    """
    speaker = "RANK" if torch.distributed.is_initialized() else "LOCAL_RANK"
    if int(os.environ.get(speaker, "0")) == 0 or isinstance(error, RankError):
        print(f"error: {error}", file=sys.stderr, flush=True)


def set_up(arguments: list[str]) -> Trainer | None:
    """Builds the trainer; None when only the plan was asked for.

    Everything that can be wrong is found before the process group starts, as far as possible.
    """
    config = load_config(arguments)
    rank = int(os.environ.get("RANK", "0"))
    world_size = config.world_size or launcher_world_size()
    deepspeed_config(config, world_size)  # for its checks
    if config.dry_run:
        print(dry_run(config, world_size))
        return None
    streaming = config.data.mode == "stream"
    mixture = None if streaming else open_prepared(config)
    tokenizer = open_tokenizer(config, world_size) if streaming else None
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    check_run_fits_model(config, model, target_length(config))
    data = None
    if mixture is not None:
        place = {"rank": rank, "world_size": world_size}
        if config.objective == "causal":
            data = read_prepared(config, mixture, reset_grid=model.reset_grid, **place)
        else:
            data = read_denoising(config, mixture.corpora[0], **place)
    check_room(config.run_dir / "checkpoints", checkpoint_bytes(model))
    saved_config = config.run_dir / "config.yaml"
    before = load_saved_config(saved_config) if saved_config.exists() else None

    world = start_process_group(config)
    unlocked = on_main(world, lambda: lock_run(config.run_dir))
    if data is None:  # One rank asks the hub for all: not before they have met.
        assert tokenizer is not None
        data = read_stream(config, tokenizer, world)
    if world.is_main:
        changed = differences(config, before).items() if before else []
        lines = [f"changed   {key}: {old} -> {new}" for key, (old, new) in changed]
        screen = first_screen(config, world_size, data.description)
        lines += [f"kernels   {missing}" for missing in describe_missing(world.device)]
        lines += [f"lock      {unlocked}"] if unlocked else []
        say(config.run_dir, "\n".join([screen, *lines]) + "\n")
    evaluate = data.validation(world) if data.validation else None
    trainer = Trainer(config, model, data.loader, world, data.facts, evaluate=evaluate)
    if world.is_main:  # not before the trainer has found that this run may go on
        save_config(config, saved_config)
        write_json(config.run_dir / "environment.json", describe_environment(world))
    return trainer


def dry_run(config: RunConfig, world_size: int) -> str:
    """The plan of the run, or all models to choose from where none is picked. Needs no corpus."""
    if config.data.mode == "stream":
        open_tokenizer(config, world_size)
        data = f"data      {config.data.source}, not looked for"
    elif config.data.path or config.data.mixture:
        data = describe_prepared(open_prepared(config))
    else:
        config.model.vocab_size = config.model.vocab_size or PLANNED_VOCAB_SIZE
        data = (
            f"data      none; planned for a vocabulary of {config.model.vocab_size:,} "
            f"(model.vocab_size), data=NAME gives its own"
        )
    if replace(config.model, vocab_size=0) == LanguageModelConfig():
        sizes = config.model.vocab_size, config.train.seq_len
        return describe_catalogue(catalogue(*sizes), *sizes)
    return first_screen(config, world_size, data)


def first_screen(config: RunConfig, world_size: int, data: str) -> str:
    """What the run will be, and on which data."""
    plan = describe(config, make_plan(config, world_size, target_length(config)))
    return "\n".join([f"commit    {git_commit()}", plan, data])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
