"""What a run reads, from its configuration: prepared corpora, or text streamed while training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.loader import build_loader, start_id
from data.mixture import Mixture, Phase
from data.shards import Corpus
from data.stream import Position, StreamLoader, StreamSource, stream_problems
from data.stream_source import first_documents, resolve
from data.tee import Tee
from data.tokenizer import Tokenizer, load_tokenizer
from pretrain.batch import StepLoader
from pretrain.config import RunConfig
from pretrain.training.checkpoint import on_main
from pretrain.training.engine import World
from pretrain.training.metrics import CorpusFacts
from pretrain.training.trainer import Evaluate
from pretrain.training.validation import Validation

ValidationSet = tuple[list[torch.Tensor], int, float]
"""Documents behind what a model in training sees before one, seq_len, bytes per token."""


class TrainingData(NamedTuple):
    """`validation` is None when evaluation is off; `description` is for the first screen."""

    loader: StepLoader
    facts: CorpusFacts
    validation: Callable[[World], Evaluate] | None
    description: str


def open_prepared(config: RunConfig) -> Mixture:
    """Opens the training splits and gives the model their vocabulary.

    Raises:
        ValueError: when there is no such corpus, or the model has another vocabulary.
    """
    entries = config.data.mixture
    if not config.data.path and not entries:
        raise ValueError(
            "data.path='': name a folder written by launch/prepare.py, or pick data=NAME (a "
            "dry_run=true needs none)"
        )
    if entries:
        phases = [Phase(0, tuple(entry.weight for entry in entries))]
        phases += [Phase(p.from_tokens, tuple(p.weights)) for p in config.data.phases]
        mixture = Mixture([Corpus.open(entry.path, entry.split) for entry in entries], phases)
    else:
        mixture = Mixture.of(Corpus.open(config.data.path, config.data.train_split))
    corpus = mixture.corpora[0]
    if entries and config.eval.documents:
        tokenizer = Corpus.open(config.data.path, config.data.val_split).tokenizer
        if tokenizer.sha256 != corpus.tokenizer.sha256:
            raise ValueError(
                f"data.path={config.data.path}: its tokenizer is not the one of {corpus.path}; "
                "validate on a corpus that was prepared with it"
            )
    _give_vocabulary(config, corpus.tokenizer, str(corpus.path))
    return mixture


def read_prepared(
    config: RunConfig, mixture: Mixture, *, reset_grid: int, rank: int, world_size: int
) -> TrainingData:
    """Prepared corpora in the order of `data.mode`."""
    loader = build_loader(
        mixture,
        mode=config.data.mode,
        boundary=config.data.boundary,
        seq_len=config.train.seq_len,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        reset_grid=reset_grid,
        prefetch_steps=config.data.prefetch_steps,
        threads=config.data.loader_threads,
    )
    facts = CorpusFacts(bytes_per_token(mixture), mixture.corpora[0].tokenizer.sha256)
    documents = open_validation(config)
    validation = partial(Validation, *documents) if documents else None
    return TrainingData(loader, facts, validation, describe_prepared(mixture))


def describe_prepared(mixture: Mixture) -> str:
    """A line per corpus, and one per phase where several are mixed."""
    lines = [
        f"data      {corpus.path}: {corpus.n_tokens:,} tokens in {corpus.n_documents:,} "
        f"documents, {bytes_per_token(Mixture.of(corpus)):.3f} bytes per token, "
        f"fingerprint {corpus.fingerprint[:16]}"
        for corpus in mixture.corpora
    ]
    if len(mixture.corpora) > 1:
        lines += [
            f"mixture   from token {phase.from_tokens:,}: weights "
            + " : ".join(f"{weight:g}" for weight in phase.weights)
            for phase in mixture.phases
        ]
    return "\n".join(lines)


def bytes_per_token(mixture: Mixture) -> float:
    """UTF-8 bytes of the text over its tokens, by the weights that training begins with."""
    weights = np.array(mixture.phases[0].weights)
    rates = [
        corpus.manifest["splits"][corpus.split]["raw_bytes"] / corpus.n_tokens
        for corpus in mixture.corpora
    ]
    return float(weights @ rates / weights.sum())


def open_validation(config: RunConfig) -> ValidationSet | None:
    """The first long enough documents of the validation split; None when evaluation is off.

    Raises:
        ValueError: when there is none, or none of `eval.tokens_per_document` tokens.
    """
    length = config.eval.tokens_per_document
    if config.eval.documents == 0:
        return None
    corpus = Corpus.open(config.data.path, config.data.val_split)
    check_not_empty(config, corpus)
    chosen = np.flatnonzero(corpus.doc_lengths >= length)[: config.eval.documents]
    if len(chosen) == 0:
        raise ValueError(
            f"eval.tokens_per_document={length}: the longest document of split "
            f"{config.data.val_split} has {corpus.doc_lengths.max()} tokens; choose that or less, "
            f"or eval.documents=0 for none"
        )
    documents = [corpus.document(i)[:length] for i in chosen.tolist()]
    return _validation_set(config, documents, corpus.tokenizer)


def check_not_empty(config: RunConfig, corpus: Corpus) -> None:
    """Raises ValueError when the validation split has no documents."""
    if corpus.n_documents == 0:
        raise ValueError(
            f"data.val_split={config.data.val_split}: {corpus.path} has no documents in it; choose "
            "another, or eval.documents=0 for none"
        )


def open_tokenizer(config: RunConfig, world_size: int) -> Tokenizer:
    """Opens the tokenizer of `data.mode=stream` and gives the model its vocabulary.

    Raises:
        ValueError: there is none, the model has another vocabulary, or the streams cannot be dealt.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    _give_vocabulary(config, tokenizer, config.data.tokenizer)
    batch = (config.global_batch_size, config.train.micro_batch_size, world_size)
    if problems := stream_problems(*batch, config.data.streams):
        raise ValueError("; ".join(problems))
    return tokenizer


def read_stream(config: RunConfig, tokenizer: Tokenizer, world: World) -> TrainingData:
    """Text as it comes, tokenised while training; called by all ranks once they have met.

    Raises:
        ValueError: on all ranks: the text is not there, or has changed since the run began.
    """
    data, patience = config.data, config.data.hub_patience_seconds

    def tee_of(source: StreamSource) -> Tee:
        folder, split = Path(data.path), data.train_split
        return Tee(folder, split, source, tokenizer, data.streams, patience)

    def find() -> tuple[StreamSource, float, list[np.ndarray]]:
        def found(place: Any, name: str) -> tuple[StreamSource, float]:
            record = config.run_dir / f"{name}.json"
            return resolve(place, data.text_field, tokenizer, record, patience)

        source, ratio = found(data.source, "source")
        if data.tee:
            tee_of(source).start()
        count, length = config.eval.documents, config.eval.tokens_per_document
        if count == 0:
            return source, ratio, []
        validation, _ = found(data.val_source, "val_source")
        return source, ratio, first_documents(validation, tokenizer, count, length, patience)

    def gather(own: dict[int, Position]) -> list[dict[int, Position]]:
        pieces: list[Any] = [None] * world.size
        torch.distributed.all_gather_object(pieces, own)
        return pieces

    source, ratio, documents = on_main(world, find)
    loader = StreamLoader(
        source,
        tokenizer,
        seq_len=config.train.seq_len,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        streams=data.streams,
        shuffle_windows=data.shuffle_windows,
        threads=data.stream_threads,
        patience=patience,
        gather=gather,
        read_part=tee_of(source).read if data.tee else None,
    )
    description = (
        f"data      {data.source}: {len(source.files)} files in {data.streams} streams, "
        f"{ratio:.3f} bytes per token, fingerprint {source.fingerprint(tokenizer)[:16]}"
    )
    validation = None
    if documents:
        validation = partial(Validation, *_validation_set(config, documents, tokenizer))
    return TrainingData(loader, CorpusFacts(ratio, tokenizer.sha256), validation, description)


def _give_vocabulary(config: RunConfig, tokenizer: Tokenizer, origin: str) -> None:
    if config.model.vocab_size == 0:
        config.model.vocab_size = tokenizer.vocab_size
    elif config.model.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer of {origin} has "
            f"{tokenizer.vocab_size} entries; leave the key out to take them"
        )


def _validation_set(
    config: RunConfig, documents: list[np.ndarray], tokenizer: Tokenizer
) -> ValidationSet:
    start = [start_id(config.data.mode, config.data.boundary)]
    tensors = [
        torch.from_numpy(np.concatenate([start, document]).astype(np.int64))
        for document in documents
    ]
    piece_bytes = np.array([len(piece) for piece in tokenizer.token_bytes()])
    n_bytes = sum(int(piece_bytes[document].sum()) for document in documents)
    return tensors, config.train.seq_len, n_bytes / sum(map(len, documents))
