"""What an encoder-decoder's run reads: a prepared corpus, damaged as `objective` says."""

from functools import partial

import torch
import torch.nn.functional as F

from data.denoising_loader import build_denoising_loader, corruptions_of, evaluation_batches
from data.mixture import Mixture
from data.shards import Corpus
from data.tokenizer import BytesTokenizer
from launch.training_data import TrainingData, check_not_empty, describe_prepared
from pretrain.batch import EncoderDecoderBatch
from pretrain.config import RunConfig
from pretrain.training.denoising_validation import DenoisingValidation
from pretrain.training.metrics import CorpusFacts


def target_length(config: RunConfig) -> int:
    """Tokens of a row's targets; 0 where they are the input's next tokens.

    Raises:
        ValueError: train.seq_len is too short to be damaged.
    """
    if config.objective == "causal":
        return 0
    corruptions = corruptions_of(config.objective, BytesTokenizer(1))  # lengths ask no tokenizer
    try:
        return max(corruption.target_length(config.train.seq_len) for corruption in corruptions)
    except ValueError as error:
        raise ValueError(
            f"train.seq_len={config.train.seq_len}, objective={config.objective}: {error}"
        ) from error


def read_denoising(
    config: RunConfig, corpus: Corpus, *, rank: int, world_size: int
) -> TrainingData:
    """A prepared corpus, damaged in the ways of `objective`.

    Raises:
        ValueError: the vocabulary has too few sentinels, or there is nothing to validate on.
    """
    loader = build_denoising_loader(
        corpus,
        objective=config.objective,
        encoder_length=config.train.seq_len,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        prefetch_steps=config.data.prefetch_steps,
    )
    targets = target_length(config)
    facts = CorpusFacts(None, corpus.tokenizer.sha256, targets)
    validation = None
    if config.eval.documents:
        rows = open_denoising_validation(config)
        validation = partial(DenoisingValidation, rows, config.train.micro_batch_size)
    described = f"{describe_prepared(Mixture.of(corpus))}\n"
    described += (
        f"objective {config.objective}: {config.train.seq_len:,} tokens read, up to {targets:,} "
        f"written"
    )
    return TrainingData(loader, facts, validation, described)


def open_denoising_validation(config: RunConfig) -> EncoderDecoderBatch:
    """The first documents of the validation split, damaged in each of the objective's ways.

    Of each document about `eval.tokens_per_document` tokens, in whole inputs.

    Raises:
        ValueError: the split has no documents.
    """
    corpus, length = Corpus.open(config.data.path, config.data.val_split), config.train.seq_len
    check_not_empty(config, corpus)
    batches = [
        batch
        for corruption in corruptions_of(config.objective, corpus.tokenizer)
        for _, batch in evaluation_batches(
            corpus,
            corruption,
            length,
            config.train.micro_batch_size,
            max_documents=config.eval.documents,
            max_chunks=-(-config.eval.tokens_per_document // corruption.source_length(length)),
        )
    ]
    width = max(batch.loss_mask.shape[1] for batch in batches)
    return EncoderDecoderBatch(
        *map(torch.cat, zip(*(_widened(batch, width) for batch in batches), strict=True))
    )


def _widened(batch: EncoderDecoderBatch, target_length: int) -> EncoderDecoderBatch:
    """Room for `target_length` targets, filled with PAD, which is 0 like False."""
    more = (0, target_length - batch.loss_mask.shape[1])
    parts = ("decoder_tokens", "loss_mask", "sentinel_mask")
    return batch._replace(**{part: F.pad(getattr(batch, part), more) for part in parts})
