"""Trains a model: deepspeed launch/train.py experiment=NAME [KEY=VALUE ...]

A plain `python launch/train.py` trains in one process. The same command resumes a run from its
newest complete checkpoint. Exit codes: 0 finished (RUN/DONE is there), 75 stopped by SIGTERM after
a checkpoint (start the same command again), 2 bad configuration or input, 1 anything else.
"""

import os
import sys
from pathlib import Path
from typing import Any

# `deepspeed` runs this file by its path: make the repository's packages importable from it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from data.loader import START_ID, build_loader
from data.shards import Corpus
from pretrain.config import RunConfig, differences, load_config, load_saved_config, save_config
from pretrain.models import LanguageModel
from pretrain.training.checkpoint import checkpoint_bytes
from pretrain.training.engine import World, deepspeed_config, leave, start_process_group
from pretrain.training.environment import describe_environment, git_commit
from pretrain.training.manifest import CheckpointError, check_room, write_json
from pretrain.training.metrics import CorpusFacts, say
from pretrain.training.plan import describe, make_plan
from pretrain.training.trainer import RankError, Trainer, TrainingError
from pretrain.training.validation import Validation

FINISHED, FAILED, BAD_INPUT, PREEMPTED = 0, 1, 2, 75


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code. Rank 0 speaks for all, except of a rank's own."""
    try:
        return run(arguments)
    except (ValueError, TrainingError, CheckpointError) as error:
        if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, RankError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return BAD_INPUT if isinstance(error, ValueError) else FAILED


def run(arguments: list[str]) -> int:
    """Everything that can be wrong is found before the process group starts, as far as possible."""
    config = load_config(arguments)
    rank, world_size = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))
    corpus = open_corpus(config)
    facts = CorpusFacts(
        bytes_per_token=int(corpus.raw_bytes.sum()) / corpus.n_tokens,
        tokenizer=corpus.tokenizer.sha256,
    )
    plan = make_plan(config, config.world_size or world_size)
    screen = "\n".join(
        [
            f"commit    {git_commit()}",
            describe(config, plan),
            f"data      {config.data.path}: {corpus.n_tokens:,} tokens in {corpus.n_documents:,} "
            f"documents, {facts.bytes_per_token:.3f} bytes per token, "
            f"fingerprint {corpus.fingerprint[:16]}",
        ]
    )
    if config.dry_run:
        print(screen)
        return FINISHED
    deepspeed_config(config, world_size)  # for its checks
    torch.manual_seed(config.seed)
    model = LanguageModel(config.model)
    if config.train.carry_state and not model.constant_state:
        raise ValueError(
            "train.carry_state=true: a layer of this model keeps every past token, so its state "
            "would grow without end; use train.carry_state=false"
        )
    loader = build_loader(
        corpus,
        mode=config.data.mode,
        boundary=config.data.boundary,
        seq_len=config.train.seq_len,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        reset_grid=model.reset_grid,
        prefetch_steps=config.data.prefetch_steps,
    )
    validation = open_validation(config)
    check_room(config.run_dir / "checkpoints", checkpoint_bytes(model))
    world = start_process_group(config)
    if world.is_main:
        describe_run(config, world, screen)
    evaluate = Validation(*validation, world) if validation else None
    trainer = Trainer(config, model, loader, world, facts, evaluate=evaluate)
    return FINISHED if trainer.fit() else PREEMPTED


def open_corpus(config: RunConfig) -> Corpus:
    """Opens the training split and gives the model its vocabulary.

    Raises:
        ValueError: when there is no such corpus, or the model has another vocabulary.
    """
    if not config.data.path:
        raise ValueError(
            "data.path='': name a folder written by launch/prepare.py, or pick data=NAME"
        )
    corpus = Corpus.open(config.data.path, config.data.train_split)
    if config.model.vocab_size == 0:
        config.model.vocab_size = corpus.vocab_size
    elif config.model.vocab_size != corpus.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer of {config.data.path} has "
            f"{corpus.vocab_size} entries; leave the key out to take them"
        )
    return corpus


def open_validation(config: RunConfig) -> tuple[list[torch.Tensor], int, float] | None:
    """The first long enough documents of the validation split; None when evaluation is off.

    Raises:
        ValueError: when no document has `eval.tokens_per_document` tokens.
    """
    length = config.eval.tokens_per_document
    if config.eval.documents == 0:
        return None
    corpus = Corpus.open(config.data.path, config.data.val_split)
    chosen = np.flatnonzero(corpus.doc_lengths >= length)[: config.eval.documents]
    if len(chosen) == 0:
        raise ValueError(
            f"eval.tokens_per_document={length}: the longest document of split "
            f"{config.data.val_split} has {corpus.doc_lengths.max()} tokens; choose that or less, "
            f"or eval.documents=0 for none"
        )
    start = [START_ID[config.data.mode]]
    documents = [
        torch.from_numpy(np.concatenate([start, corpus.document(i)[:length]]).astype(np.int64))
        for i in chosen.tolist()
    ]
    piece_bytes = np.array([len(piece) for piece in corpus.tokenizer.token_bytes()])
    n_bytes = sum(int(piece_bytes[document[1:].numpy()].sum()) for document in documents)
    return documents, config.train.seq_len, n_bytes / (length * len(documents))


def describe_run(config: RunConfig, world: World, screen: str) -> None:
    """Prints the first screen and writes config.yaml and environment.json."""
    saved = config.run_dir / "config.yaml"
    lines = [screen]
    if saved.exists():
        changed = differences(config, load_saved_config(saved))
        lines += [f"changed   {key}: {old} -> {new}" for key, (old, new) in changed.items()]
    say(config.run_dir, "\n".join(lines) + "\n")
    save_config(config, saved)
    environment: dict[str, Any] = describe_environment(world)
    write_json(config.run_dir / "environment.json", environment)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
