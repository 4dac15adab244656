import json
from itertools import cycle, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_config

from data.denoising import Sentinels, SpanCorruption, restore
from data.denoising_loader import (
    OBJECTIVES,
    DenoisingLoader,
    build_denoising_loader,
    corruptions_of,
    evaluation_batches,
)
from data.prepare import prepare
from data.shards import Corpus
from data.tokenizer import EOS_ID, PAD_ID
from pretrain.batch import EncoderDecoderBatch

S, G = 128, 8  # encoder_length, global batch size


@pytest.fixture(scope="module")
def corpus(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    out = tmp_path_factory.mktemp("denoising") / "corpus"
    prepare(make_config(source, out, n_sentinels=100))
    return Corpus.open(out, "train")


def loader_of(corpus: Corpus, objective: str, **changes) -> DenoisingLoader:
    arguments = {
        "encoder_length": S,
        "global_batch_size": G,
        "micro_batch_size": G,
        "seed": 1,
        "prefetch_steps": 0,
    }
    return build_denoising_loader(corpus, objective=objective, **{**arguments, **changes})


def joined(micro_batches: list[EncoderDecoderBatch]) -> EncoderDecoderBatch:
    batches = [batch._replace(encoder_mask=mask_of(batch)) for batch in micro_batches]
    return EncoderDecoderBatch(*map(torch.cat, zip(*batches, strict=True)))


def mask_of(batch: EncoderDecoderBatch) -> torch.Tensor:
    """Where it is left out, no row has PAD."""
    if batch.encoder_mask is None:
        return torch.ones_like(batch.encoder_tokens, dtype=torch.bool)
    return batch.encoder_mask


def assert_equal(one: EncoderDecoderBatch, other: EncoderDecoderBatch) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def steps_per_epoch(corpus: Corpus, objective: str) -> int:
    corruptions = corruptions_of(objective, corpus.tokenizer)
    n = sum(corruption.source_length(S) for corruption in corruptions)
    return -(-corpus.n_tokens // (n * G)) * len(corruptions)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_stopping_anywhere_and_going_on_with_other_ranks_gives_the_same_batches(
    corpus: Corpus, objective: str
) -> None:
    n_steps = steps_per_epoch(corpus, objective) + 9  # Over the end of an epoch.
    whole = [joined(step) for step in islice(loader_of(corpus, objective).steps(0), n_steps)]
    layouts = cycle([(1, 1), (2, 2), (4, 1), (8, 1)])
    for start in range(0, n_steps - 2, 5):
        world_size, grad_accum_steps = next(layouts)
        size = G // world_size // grad_accum_steps
        changes = {"world_size": world_size, "micro_batch_size": size}
        ranks = [
            loader_of(corpus, objective, rank=rank, **changes).steps(start)
            for rank in range(world_size)
        ]
        for expected in whole[start : start + 2]:
            parts = [next(rank) for rank in ranks]
            assert [len(part) for part in parts] == [grad_accum_steps] * world_size
            assert_equal(joined([batch for part in parts for batch in part]), expected)


def test_a_thread_makes_the_same_batches(corpus: Corpus) -> None:
    for one, other in zip(
        islice(loader_of(corpus, "ul2").steps(3), 10),
        loader_of(corpus, "ul2", prefetch_steps=2).steps(3),
        strict=False,
    ):
        assert_equal(joined(one), joined(other))


@pytest.mark.parametrize("objective", ["span", "ul2"])
def test_an_epoch_restores_to_every_token_of_the_corpus_once(
    corpus: Corpus, objective: str
) -> None:
    # One window at a time: an epoch is then a whole number of steps.
    corruptions = corruptions_of(objective, corpus.tokenizer)
    lengths = [corruption.source_length(S) for corruption in corruptions]
    n_windows = -(-corpus.n_tokens // sum(lengths))
    loader = loader_of(corpus, objective, global_batch_size=1, micro_batch_size=1)
    sentinels = Sentinels.of(corpus.tokenizer)
    found = []
    for (batch,) in islice(loader.steps(0), n_windows * len(corruptions)):
        found.append(
            restore(batch.encoder_tokens[0].numpy(), batch.decoder_tokens[0, 1:].numpy(), sentinels)
        )
    tokens = np.concatenate([corpus.document(i) for i in range(corpus.n_documents)]).astype(
        np.int64
    )
    edges = np.cumsum([0, *lengths])
    expected = [
        tokens[begin:][a:b][: max(0, sum(lengths) - a)]
        for begin in range(0, corpus.n_tokens, sum(lengths))
        for a, b in pairwise(edges)
    ]
    assert sorted(map(bytes, found)) == sorted(map(bytes, expected))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_masks_say_what_the_tokens_are(corpus: Corpus, objective: str) -> None:
    sentinels = Sentinels.of(corpus.tokenizer)
    full = 0
    for step in islice(loader_of(corpus, objective).steps(0), 20):
        (batch,) = step
        target_length = batch.loss_mask.shape[1]
        encoder_mask = mask_of(batch)
        assert (batch.encoder_mask is None) == bool(encoder_mask.all())
        assert batch.encoder_tokens.shape == encoder_mask.shape == (G, S)
        assert batch.decoder_tokens.shape == (G, target_length + 1)
        assert batch.encoder_tokens.dtype == batch.decoder_tokens.dtype == torch.int64
        assert (batch.decoder_tokens[:, 0] == PAD_ID).all(), "T5's decoder starts with PAD"
        targets = batch.decoder_tokens[:, 1:]
        for mask, tokens in (
            (encoder_mask, batch.encoder_tokens),
            (batch.loss_mask, targets),
        ):
            assert torch.equal(mask, tokens != PAD_ID)
            lengths = mask.sum(1)
            assert torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])
            rows = lengths > 0
            assert (tokens[rows, lengths[rows] - 1] == EOS_ID).all()
        assert torch.equal(batch.sentinel_mask, targets >= sentinels.first)
        assert (encoder_mask.sum(1) > 0).all(), "attention over nothing is not a number"
        full += int(encoder_mask.all(1).sum())
    assert full >= 0.9 * 20 * G, "only the last window of an epoch leaves an input unfilled"


def test_ul2_gives_each_row_every_denoiser_once_in_seven_steps(corpus: Corpus) -> None:
    sentinels = Sentinels.of(corpus.tokenizer)
    modes = {sentinels.mode(name): name for name in "RSX"}
    steps = list(islice(loader_of(corpus, "ul2").steps(0), 14))
    firsts = torch.stack([step[0].encoder_tokens[:, 0] for step in steps])
    for bundle in (firsts[:7], firsts[7:]):
        for row in bundle.T.tolist():
            assert sorted(modes[token] for token in row) == list("RRSXXXX")
    assert len({tuple(row) for row in firsts[:7].T.tolist()}) > 1, "rows take them in other orders"


def test_masks_change_with_the_epoch_and_the_seed(corpus: Corpus) -> None:
    one = next(loader_of(corpus, "span").steps(0))[0].encoder_tokens
    other_seed = next(loader_of(corpus, "span", seed=2).steps(0))[0].encoder_tokens
    assert not torch.equal(one, other_seed)


def test_the_saved_state_names_each_difference(corpus: Corpus) -> None:
    saved = json.loads(json.dumps(loader_of(corpus, "ul2").state(12)))
    loader_of(corpus, "ul2", micro_batch_size=2, world_size=2, rank=1).check_state(saved)
    with pytest.raises(ValueError, match=r"objective: saved ul2, now span; .*corruptions"):
        loader_of(corpus, "span").check_state(saved)
    with pytest.raises(ValueError, match="encoder_length: saved 128, now 64"):
        loader_of(corpus, "ul2", encoder_length=64).check_state(saved)
    with pytest.raises(ValueError, match="seed: saved 1, now 2"):
        loader_of(corpus, "ul2", seed=2).check_state(saved)
    span = loader_of(corpus, "span").state(5)
    span["corruptions"][0]["noise_density"] = 0.3
    with pytest.raises(ValueError, match=r"corruptions: saved .*0\.3"):
        loader_of(corpus, "span").check_state(span)


def test_too_few_sentinels_are_refused_before_training(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"n_sentinels=100: objective=ul2 .*=512 needs 130"):
        loader_of(corpus, "ul2", encoder_length=512)
    with pytest.raises(ValueError, match="objective=bart: must be one of span, ul2, gap"):
        loader_of(corpus, "bart")


def test_evaluation_masks_are_fixed_and_cover_every_document(corpus: Corpus) -> None:
    corruption = SpanCorruption(Sentinels.of(corpus.tokenizer))

    def rows(batch_size: int) -> list[tuple]:
        return [
            (document, *(tuple(part[row].tolist()) for part in batch))
            for documents, batch in evaluation_batches(corpus, corruption, S, batch_size)
            for row, document in enumerate(documents.tolist())
        ]

    found = rows(5)
    assert found == rows(5) == rows(16), "neither the call nor the batch size enters"
    texts: dict[int, list[np.ndarray]] = {}
    for document, encoder, _, decoder, *_ in found:
        text = restore(np.array(encoder), np.array(decoder[1:]), corruption.sentinels)
        texts.setdefault(document, []).append(text)
    assert sorted(texts) == list(range(corpus.n_documents))
    for document, parts in texts.items():
        assert np.array_equal(np.concatenate(parts), corpus.document(document))
